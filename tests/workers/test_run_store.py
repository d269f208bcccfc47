"""A run's checkpoints in the store: whole or not at all, only what changed, and nothing of who was overtaken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.training import carried
from stoker.broker import keys, ledger, policy
from stoker.settings import Settings
from tests.workers.carrying import RunFolder, Worker, asked, files
from workers.artifacts import Artifacts, StoreFolder
from workers.run_manifest import Manifest, StoredFile, content_name
from workers.run_parts import BrokerParts, FolderParts, NoRoom, Parts
from workers.run_store import Damaged, RunStore
from workers.services.runtime import Fenced

REQUEST = asked()


@pytest.fixture(params=["broker", "file", "memory"])
def fleet(request: pytest.FixtureRequest, broker: Settings, redis: Any, tmp_path: Path) -> Callable[..., Worker]:
    """Makes workers that share a store."""
    url = None if request.param == "broker" else f"{request.param}://{tmp_path}/store"

    def make(name: str, **changes: Any) -> Worker:
        return Worker(broker, redis, tmp_path / name, name, artifacts=url, **changes)

    return make


def put(store: RunStore, run: Path) -> None:
    with ExitStack() as resources:
        found = carried.snapshot(run, resources)
        assert found is not None
        store.put(found)


def parts(worker: Worker) -> set[str]:
    """Those that lie in the store, whether they are needed or not."""
    if worker.runtime.settings.artifacts is None:
        names = {name.decode() for name in worker.redis.hkeys(keys.checkpoint("job"))}
        return names - {"manifest", "bytes"}
    return set(folder(worker).names())


def folder(worker: Worker) -> StoreFolder:
    found = Artifacts(worker.runtime.settings, None).folder(".runs/job")
    assert found is not None
    return found


def install(store: RunStore, home: Path) -> dict[str, bytes]:
    found = store.manifest()
    assert found is not None
    store.install(found, home)
    return files(home)


def test_another_worker_gets_the_newest_two_the_best_and_the_reports(fleet: Any, tmp_path: Path) -> None:
    first, run = fleet("one"), RunFolder(tmp_path / "one", REQUEST)
    store = RunStore(first.own(REQUEST))
    for step in (5, 10, 15):
        run.save(step, best=10 if step > 5 else 5)
    run.report(17)
    put(store, run.path)
    found = install(RunStore(fleet("two").own(REQUEST)), tmp_path / "two/runs/job")
    names = {name.split("/")[1] for name in found if "/" in name}
    assert names == {"step-00000010", "step-00000015", "best-00000010"}
    everything = files(run.path)
    assert found == {name: everything[name] for name in found} | {"log.jsonl": found["log.jsonl"]}
    assert found["log.jsonl"].count(b"\n") == 15, "the checkpoint knows of no more"


def counting(plain: Callable[..., Any], sent: list[int]) -> Callable[..., Any]:
    """The bytes of each part that is sent."""

    def act(*given: Any) -> Any:
        sent.append(len(given[-1]))
        return plain(*given)

    return act


def test_only_what_changed_is_sent(fleet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "one", REQUEST)
    store = RunStore(fleet("one").own(REQUEST))
    sent: list[int] = []
    for owner, name in ((ledger, "keep_part"), (StoreFolder, "put")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), sent))
    run.save(5)
    put(store, run.path)
    count = len(sent)
    put(store, run.path)
    assert len(sent) == count, "it is there"
    run.save(10)
    put(store, run.path)
    assert len(sent) == count + 4, "the two files with numbers, the notes, and the reports"
    assert parts(fleet("one")) == set(store.manifest().parts)  # type: ignore[union-attr]


class Dead(BaseException):
    """The process is gone."""


@contextmanager
def at_each_write(act: Callable[[int, str], None], *, behind: bool = False) -> Iterator[None]:
    """Call `act` with the number and name of each write to a store, before it or behind it."""
    count = iter(range(1000))

    def watched(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def write(*given: Any) -> Any:
            if not behind:
                act(next(count), name)
            found = plain(*given)
            if behind:
                act(next(count), name)
            return found

        return write

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((ledger, "keep_part"), (ledger, "keep_manifest"), (StoreFolder, "put")):
            patch.setattr(owner, name, watched(getattr(owner, name), name))
        yield


def die_at(number: int) -> Callable[[int, str], None]:
    def act(count: int, _: str) -> None:
        if count == number:
            raise Dead

    return act


def overtake_at(number: int, taker: Worker) -> Callable[[int, str], None]:
    def act(count: int, _: str) -> None:
        if count == number:
            taker.own(REQUEST)

    return act


def reset(worker: Worker, there: set[str], stored: dict[bytes, bytes]) -> None:
    """The store as it was."""
    worker.redis.delete(keys.checkpoint("job"))
    worker.redis.hset(keys.checkpoint("job"), mapping=stored)
    worker.redis.expire(keys.checkpoint("job"), 60)
    if worker.runtime.settings.artifacts is not None:
        folder(worker).remove(parts(worker) - there)


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_an_upload_that_is_cut_between_any_two_writes_leaves_the_former_whole(
    fleet: Any, tmp_path: Path, behind: bool
) -> None:
    run = RunFolder(tmp_path / "one", REQUEST)
    run.save(5, best=5)
    put(RunStore(fleet("one").own(REQUEST)), run.path)
    former = install(RunStore(fleet("two").own(REQUEST)), tmp_path / "former")
    there, stored = parts(fleet("two")), fleet("two").redis.hgetall(keys.checkpoint("job"))
    run.save(10, best=9)
    for number in range(100):
        name = f"{behind}-{number}"
        store, died = RunStore(fleet(name).own(REQUEST)), False
        with at_each_write(die_at(number), behind=behind):
            try:
                put(store, run.path)
            except Dead:
                died = True
        left = install(RunStore(fleet(f"{name}-next").own(REQUEST)), tmp_path / f"{name}-left")
        if left != former:
            break
        assert died
        assert parts(fleet(name)) >= there
        reset(fleet(name), there, stored)
    assert number == (5 if behind else 6), "each write was cut: reports, adapter, state, notes, best, manifest"
    assert died == behind, "behind the manifest, the new one is there"
    # The best of before is not needed any more.
    shutil.rmtree(run.path / "checkpoints/best-00000005")
    assert left == files(run.path)
    last = RunStore(fleet("last").own(REQUEST))
    run.save(11, best=9)
    with at_each_write(die_at(2)), pytest.raises(Dead):
        put(last, run.path)
    last = RunStore(fleet("very last").own(REQUEST))
    put(last, run.path)
    assert parts(fleet("last")) == set(last.manifest().parts), "what was cut is swept"  # type: ignore[union-attr]


def test_who_was_overtaken_leaves_no_part_and_no_manifest(fleet: Any, tmp_path: Path) -> None:
    """At each write it may be frozen."""
    run = RunFolder(tmp_path / "one", REQUEST)
    run.save(5)
    put(RunStore(fleet("first").own(REQUEST)), run.path)
    former, stored = parts(fleet("first")), fleet("first").redis.hgetall(keys.checkpoint("job"))
    run.save(10)
    for number in range(100):
        frozen, taker = RunStore(fleet(f"frozen-{number}").own(REQUEST)), fleet(f"taker-{number}")
        with at_each_write(overtake_at(number, taker)):
            try:
                put(frozen, run.path)
            except Fenced:
                manifest = RunStore(taker.own(REQUEST)).manifest()
                assert manifest is not None
                assert set(manifest.parts) == former, "that of before"
                reset(taker, former, stored) if taker.runtime.settings.artifacts is None else None
                assert parts(taker) == former
            else:
                break
    assert number > 4, "it was frozen at each write"


def test_parts_of_the_next_owner_stay_when_the_former_wakes_up(fleet: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one", REQUEST)
    run.save(5)
    frozen, taker = RunStore(fleet("one").own(REQUEST)), None
    put(frozen, run.path)
    run.save(10)
    taker = RunStore(fleet("two").own(REQUEST))
    put(taker, run.path)
    with pytest.raises(Fenced):
        put(frozen, run.path)
    assert install(taker, tmp_path / "three")["log.jsonl"].count(b"\n") == 10
    assert parts(fleet("two")) == set(taker.manifest().parts)  # type: ignore[union-attr]


def test_an_owner_that_was_overtaken_takes_back_its_own_parts_alone(tmp_path: Path) -> None:
    """The next owner's may be on their way, and in no manifest yet."""
    store = Artifacts(Settings(artifacts=f"memory://{tmp_path}/store"), None).folder(".runs/job")
    assert store is not None
    others = f"{content_name(b'x')}-{'0' * 8}"
    store.put(others, b"x")
    own = FolderParts(store, "token")
    assert own.there([]) == {}
    kept = own.put(content_name(b"y"), b"y")
    assert sorted(store.names()) == sorted([others, kept])
    own.fenced()
    assert store.names() == [others]


def test_a_run_that_is_too_large_for_the_store_is_refused_before_anything_is_sent(fleet: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one", REQUEST, size=100_000)
    run.save(5)
    store = RunStore(fleet("one", checkpoint_megabytes=1).own(REQUEST))
    with pytest.raises(NoRoom, match=r"\d+ bytes, and 1048576 are allowed \(STOKER_CHECKPOINT_MEGABYTES\)"):
        put(store, run.path)
    assert not parts(fleet("one"))


def test_a_broker_without_room_says_what_would_help(broker: Settings, redis: Any, tmp_path: Path) -> None:
    worker, run = Worker(broker, redis, tmp_path / "one"), RunFolder(tmp_path / "one", REQUEST)
    run.save(5)
    store = RunStore(worker.own(REQUEST))
    policy.decide(redis, "queue_bytes", 5000)
    with pytest.raises(NoRoom, match="takes checkpoints up to 2500, half of queue_bytes"):
        put(store, run.path)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_what_is_not_what_was_put_there_is_never_installed(fleet: Any, tmp_path: Path, how: str) -> None:
    worker, run = fleet("one"), RunFolder(tmp_path / "one", REQUEST)
    run.save(5)
    store = RunStore(worker.own(REQUEST))
    put(store, run.path)
    for name in parts(worker):
        if worker.runtime.settings.artifacts is not None:
            folder(worker).remove([name])
            if how == "damaged":
                folder(worker).put(name, b"x")
        elif how == "damaged":
            worker.redis.hset(keys.checkpoint("job"), name, b"x")
        else:
            worker.redis.hdel(keys.checkpoint("job"), name)
    with pytest.raises(Damaged, match=how):
        install(store, tmp_path / "two")
    assert not [name for name in files(tmp_path / "two") if "step" in name]


def test_a_file_name_that_leaves_the_runs_folder_is_no_manifest(redis: Any) -> None:
    good = Manifest(reports=1, micro=1, made_of={}, files=()).model_dump(mode="json")
    for name in ("../x", "step-00000001/../../x", "/etc/passwd", "step-1/stoker.json", "log.jsonl\n", "run.json"):
        raw = {**good, "files": [{"name": name, "parts": []}]}
        assert Manifest.parse(json.dumps(raw).encode(), "job") is None
    assert Manifest.parse(b"", "job") is None
    assert Manifest.parse(b'{"form": 2}', "job") is None


def test_a_part_that_two_files_share_is_one_part_of_a_checkpoint() -> None:
    one, two = (content_name(data) for data in (b"a", b"b"))
    files = [StoredFile(name=name, parts=(one, two)) for name in ("log.jsonl", "step-00000001/stoker.json")]
    assert Manifest(reports=1, micro=1, made_of={}, files=tuple(files)).parts == [one, two]


def test_the_end_of_a_run_leaves_nothing(fleet: Any, tmp_path: Path) -> None:
    worker, run = fleet("one"), RunFolder(tmp_path / "one", REQUEST)
    run.save(5)
    lease = worker.own(REQUEST)
    store = RunStore(lease)
    put(store, run.path)
    lease.runtime.persist = lambda action: action()
    lease.complete(ledger.success("job", {}))
    store.clear()
    assert not parts(worker)
    assert not worker.redis.exists(keys.checkpoint("job"))


@pytest.mark.parametrize("kind", [BrokerParts, FolderParts])
def test_a_file_of_any_length_is_carried_to_its_last_byte(
    broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Parts]
) -> None:
    monkeypatch.setattr(kind, "size", 16)
    url = None if kind is BrokerParts else f"memory://{tmp_path}/store"
    worker = Worker(broker, redis, tmp_path / "one", "one", artifacts=url)
    for length in (1, 15, 16, 17, 32, 33):
        run = RunFolder(tmp_path / str(length), REQUEST)
        run.save(length)
        weights = run.path / f"checkpoints/step-{length:08}/adapter_model.safetensors"
        weights.write_bytes(bytes(range(length)))
        store = RunStore(worker.own(REQUEST))
        put(store, run.path)
        found = install(store, tmp_path / f"{length}-copy")
        assert found[weights.relative_to(run.path).as_posix()] == bytes(range(length))


def test_a_manifest_is_kept_only_if_all_its_parts_are_in_the_broker(
    broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next owner would find a run that it cannot begin with."""
    worker, run = Worker(broker, redis, tmp_path / "one", "one"), RunFolder(tmp_path / "one", REQUEST)
    store = RunStore(worker.own(REQUEST))
    run.save(5)
    put(store, run.path)
    before = worker.redis.hget(keys.checkpoint("job"), "manifest")
    plain = ledger.keep_manifest

    def after_a_loss(redis: Any, job_id: str, queue: str, token: str, manifest: str, names: Any) -> Any:
        redis.hdel(keys.checkpoint(job_id), *[name for name in parts(worker) if name not in before.decode()])
        return plain(redis, job_id, queue, token, manifest, names)

    monkeypatch.setattr(ledger, "keep_manifest", after_a_loss)
    run.save(10)
    with pytest.raises(Damaged, match="parts are gone that were put there"):
        put(store, run.path)
    assert worker.redis.hget(keys.checkpoint("job"), "manifest") == before
