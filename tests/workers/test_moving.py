"""When a run's checkpoints go to the store, what a worker that gets the run begins with, and what stays at its end."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from engine.training import carried
from engine.training.data import with_steps
from stoker.broker import keys, ledger
from stoker.contract import CONTRACT, ModelCard, Presence
from stoker.errors import JobCancelled, JobDead, JobFailed, WorkerUnavailable
from stoker.settings import Settings
from tests.conftest import wait_until
from tests.workers.carrying import RunFolder, Worker, asked, files
from workers import moving
from workers.moving import RunMirror, resume, wanted
from workers.run_store import RunStore
from workers.services.runtime import Fenced

REQUEST = asked()
STOPPING = WorkerUnavailable("the worker is stopping")


@pytest.fixture
def worker(broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(moving, "RETRY_EVERY", 0.02)
    monkeypatch.setattr(moving, "REST", 0.0)
    return Worker(broker, redis, tmp_path / "one", "one", checkpoints="always")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "one", REQUEST)


def stored(redis: Any) -> bytes | None:
    found: bytes | None = redis.hget(keys.checkpoint("job"), "manifest")
    return found


def is_behind(redis: Any, reports: int) -> Callable[[], bool]:
    return lambda: f'"reports":{reports},'.encode() in (stored(redis) or b"")


def leave(job: Any, error: BaseException, meanwhile: Callable[[RunMirror], object] = lambda mirror: None) -> None:
    """A run that ends here with `error`."""

    def run() -> None:
        with RunMirror(job, REQUEST) as mirror:
            meanwhile(mirror)
            raise error

    with pytest.raises(type(error)):
        run()


# Upwards


def test_each_checkpoint_goes_to_the_store_while_the_engine_goes_on(
    worker: Worker, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine calls returns though the store takes nothing."""
    blocked, plain = threading.Event(), ledger.keep_part
    monkeypatch.setattr(ledger, "keep_part", lambda *given: blocked.wait(30) and plain(*given))
    with RunMirror(worker.job(REQUEST), REQUEST) as mirror:
        for step in (5, 10):
            run.save(step)
            mirror.kept()
        assert stored(worker.redis) is None
        blocked.set()
        wait_until(is_behind(worker.redis, 10), "the newest is there")


@pytest.mark.parametrize("error", [RedisConnectionError("away"), OSError("a disk that hangs")])
def test_an_upload_that_failed_is_tried_again_and_said_once(
    worker: Worker, run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    plain, left = ledger.keep_part, [error] * 3

    def failing(*given: Any) -> Any:
        if left:
            raise left.pop()
        return plain(*given)

    monkeypatch.setattr(ledger, "keep_part", failing)
    with RunMirror(worker.job(REQUEST), REQUEST) as mirror:
        run.save(5)
        mirror.kept()
        wait_until(is_behind(worker.redis, 5), "it is there")
    said = [record.message for record in caplog.records if record.name == "workers.moving"]
    assert said == [f"job job: its newest checkpoint is on this machine alone: {type(error).__name__}: {error}"]


def test_a_checkpoint_that_is_too_large_is_one_line_and_the_run_goes_on(
    broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(moving, "REST", 0.0)
    worker = Worker(broker, redis, tmp_path / "one", "one", checkpoint_megabytes=1)
    run, tried = RunFolder(tmp_path / "one", REQUEST, size=50_000), threading.Semaphore(0)
    plain = RunStore.put

    def counting(*given: Any) -> None:
        tried.release()
        plain(*given)

    monkeypatch.setattr(RunStore, "put", counting)
    with RunMirror(worker.job(REQUEST), REQUEST) as mirror:
        for step in (5, 10):
            run.save(step)
            mirror.kept()
            assert tried.acquire(timeout=30)
    said = [record.message for record in caplog.records if record.name == "workers.moving"]
    assert len(said) == 1
    assert "STOKER_CHECKPOINT_MEGABYTES" in said[0]
    assert stored(redis) is None


def test_what_people_put_next_to_a_checkpoint_is_not_carried_and_hinders_nothing(
    worker: Worker, run: RunFolder
) -> None:
    """A Finder that shows a folder leaves a file in it; and a copy of a checkpoint is none of the run's."""
    run.save(5)
    checkpoint = run.path / "checkpoints/step-00000005"
    (checkpoint / ".DS_Store").write_bytes(b"view")
    (checkpoint / "plots").mkdir()
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000005 copy"))
    job = worker.job(REQUEST)
    leave(job, STOPPING)
    found = RunStore(job.lease).manifest()
    assert found is not None
    assert sorted(file.name for file in found.files if file.name != "log.jsonl") == [
        f"step-00000005/{name}"
        for name in ("adapter_config.json", "adapter_model.safetensors", "stoker.json", "trainer.safetensors")
    ]


def test_a_run_that_is_given_back_is_put_there_as_it_is(worker: Worker, run: RunFolder) -> None:
    job = worker.job(REQUEST)
    run.save(5)
    run.pause(7, 15)
    leave(job, STOPPING)
    found = RunStore(job.lease).manifest()
    assert found is not None
    assert found.position == carried.Position(7, 15)
    assert {name.name.partition("/")[0] for name in found.files} == {
        "log.jsonl",
        "step-00000005",
        "paused-00000007-00000015",
    }


def test_a_worker_that_is_stopped_waits_no_longer_than_it_may(
    worker: Worker, run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(moving, "FLUSH", 0.0)
    run.save(5)
    leave(worker.job(REQUEST), STOPPING)
    assert stored(worker.redis) is None
    assert "the worker stops, and 0 s were not enough" in caplog.text


def test_a_defect_in_the_last_upload_does_not_take_the_place_of_what_ended_the_job(
    worker: Worker, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "snapshot", lambda *_: 1 / 0)
    leave(worker.job(REQUEST), STOPPING)


def test_who_was_overtaken_puts_nothing_there(worker: Worker, run: RunFolder) -> None:
    job = worker.job(REQUEST)
    run.save(5)
    worker.name = "next"
    worker.own(REQUEST)

    def notice(mirror: RunMirror) -> None:
        mirror.kept()
        wait_until(lambda: not mirror.runs, "it notices")

    leave(job, Fenced("job runs elsewhere"), notice)
    assert stored(worker.redis) is None


@pytest.mark.parametrize(
    ("error", "stays"),
    [(JobCancelled("x"), False), (JobFailed("x"), False), (JobDead("x"), True), (Fenced("x"), True), (STOPPING, True)],
    ids=lambda value: type(value).__name__,
)
def test_a_shared_folder_is_emptied_when_the_run_has_ended_and_only_then(
    worker: Worker, run: RunFolder, tmp_path: Path, error: Exception, stays: bool
) -> None:
    worker.runtime.settings = worker.runtime.settings.model_copy(update={"artifacts": f"file://{tmp_path}/store"})
    job = worker.job(REQUEST)
    run.save(5)

    def send(mirror: RunMirror) -> None:
        mirror.kept()
        wait_until(is_behind(worker.redis, 5), "it is there")

    leave(job, error, send)
    assert (tmp_path / "store/.runs/job").exists() == stays
    with RunMirror(job, REQUEST) as mirror:
        send(mirror)
    assert not (tmp_path / "store/.runs/job").exists(), "it is done"


# Whether


def presence(worker: str, *kinds: str, contract: int = CONTRACT) -> str:
    card = ModelCard(model="m", architecture="a", kinds=kinds, context=1, parameters=1, contract=contract)
    return Presence(
        worker=worker, host="h", pid=1, device="cpu", started=0, time=0, models=(card,), adapters={}, lanes={},
        memory_bytes=0,
    ).model_dump_json()  # fmt: skip


@pytest.mark.parametrize(
    ("how", "own_broker", "others", "contract", "is_wanted"),
    [
        ("always", True, [], CONTRACT, True),
        ("never", False, ["train"], CONTRACT, False),
        ("auto", False, [], CONTRACT, True),
        ("auto", True, [], CONTRACT, False),
        ("auto", True, ["train"], CONTRACT, True),
        ("auto", True, ["train"], CONTRACT + 1, False),
        ("auto", True, ["generate"], CONTRACT, False),
    ],
)
def test_by_default_they_are_sent_except_where_nobody_would_gain(
    broker: Settings,
    redis: Any,
    tmp_path: Path,
    how: str,
    own_broker: bool,
    others: list[str],
    contract: int,
    is_wanted: bool,
) -> None:
    home = broker.home if own_broker else tmp_path
    worker = Worker(broker, redis, home, "one", checkpoints=how)
    for name, kinds in [("one", ["train"]), ("other", others)]:
        redis.set(keys.worker(name), presence(name, *kinds, contract=contract), ex=10)
        redis.zadd(keys.WORKERS, {name: 1.0})
        redis.expire(keys.WORKERS, 60)
    assert (worker.runtime.settings.running_broker is not None) == own_broker
    assert wanted(worker.runtime, "m") is is_wanted


# Downwards


def moved(worker: Worker, broker: Settings, tmp_path: Path, name: str = "two") -> tuple[Worker, Path]:
    other = Worker(broker, worker.redis, tmp_path / name, name)
    return other, tmp_path / name / "runs/job"


def upload(worker: Worker) -> None:
    leave(worker.job(REQUEST), STOPPING)


def test_a_worker_begins_where_another_left_the_run(
    worker: Worker, run: RunFolder, broker: Settings, tmp_path: Path
) -> None:
    run.save(5, best=5)
    run.save(10, best=5)
    upload(worker)
    other, folder = moved(worker, broker, tmp_path)
    resume(other.job(REQUEST), REQUEST)
    assert files(folder) == files(run.path)


def test_a_damaged_checkpoint_of_the_disk_gives_way_to_the_one_of_the_store(
    worker: Worker, run: RunFolder, broker: Settings, tmp_path: Path
) -> None:
    """Behind a power cut, or on a disk with a bad block."""
    run.save(5)
    run.save(10)
    upload(worker)
    other, folder = moved(worker, broker, tmp_path)
    resume(other.job(REQUEST), REQUEST)
    (folder / "checkpoints/step-00000010/stoker.json").write_text("{")
    (folder / "checkpoints/step-00000005/trainer.safetensors").write_bytes(b"")
    resume(other.job(REQUEST), REQUEST)
    assert files(folder) == files(run.path)


def test_of_disk_and_store_the_one_that_is_further_counts(
    worker: Worker, run: RunFolder, broker: Settings, tmp_path: Path
) -> None:
    run.save(5)
    upload(worker)
    other, folder = moved(worker, broker, tmp_path)
    resume(other.job(REQUEST), REQUEST)
    further = RunFolder.of(folder, REQUEST)
    further.save(8)
    before = files(folder)
    resume(other.job(REQUEST), REQUEST)
    assert files(folder) == before, "its own disk is further"
    upload(other)
    resume(worker.job(REQUEST), REQUEST)
    assert carried.newest(run.path).position == carried.Position(8, 8)  # type: ignore[union-attr]
    assert (run.path / "log.jsonl").read_bytes() == before["log.jsonl"]


def test_a_run_that_was_asked_for_in_epochs_goes_on_where_another_worker_left_it(
    worker: Worker, broker: Settings, tmp_path: Path
) -> None:
    """Its checkpoints say the steps that the epochs are, which only the dataset says."""
    request = asked(epochs=3)
    run = RunFolder(tmp_path / "one", with_steps(request, 40))
    run.save(5)
    leave(worker.job(request), STOPPING)
    other, folder = moved(worker, broker, tmp_path)
    resume(other.job(request), request)
    assert files(folder) == files(run.path)


@pytest.mark.parametrize("differs", ["base", "request"])
def test_what_was_made_of_another_base_or_asked_otherwise_is_left_out_and_said(
    worker: Worker, broker: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, differs: str
) -> None:
    request = asked(rank=2) if differs == "request" else REQUEST
    run = RunFolder(tmp_path / "one", request, base="another" if differs == "base" else "base")
    run.save(5)
    upload(worker)
    other, folder = moved(worker, broker, tmp_path)
    resume(other.job(REQUEST), REQUEST)
    assert not folder.exists()
    assert f"were made of another {differs} than this worker has" in caplog.text


def test_a_store_with_damaged_parts_is_left_out_and_said(
    worker: Worker, run: RunFolder, broker: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.save(5)
    upload(worker)
    for name in worker.redis.hkeys(keys.checkpoint("job")):
        if name not in (b"manifest", b"bytes"):
            worker.redis.hset(keys.checkpoint("job"), name, b"another")
    other, folder = moved(worker, broker, tmp_path)
    resume(other.job(REQUEST), REQUEST)
    assert carried.newest(folder) is None
    assert "cannot be used" in caplog.text


def test_a_process_that_dies_while_it_begins_leaves_what_the_next_one_completes(
    worker: Worker, run: RunFolder, broker: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file."""
    run.save(5, best=5)
    run.save(10, best=5)
    upload(worker)
    plain = RunStore.fetched
    for number in range(1, 100):
        other, folder = moved(worker, broker, tmp_path, f"two-{number}")
        count = iter(range(100))

        def fetch(store: RunStore, part: str, number: int = number, count: Iterator[int] = count) -> bytes:
            if next(count) == number:
                raise KeyboardInterrupt
            return plain(store, part)

        with monkeypatch.context() as patch:
            patch.setattr(RunStore, "fetched", fetch)
            try:
                resume(other.job(REQUEST), REQUEST)
            except KeyboardInterrupt:
                found = carried.newest(folder)
                assert found is None or found.position.reports == 5
            else:
                break
        resume(other.job(REQUEST), REQUEST)
        assert files(folder) == files(run.path)
    assert number > 8


def test_a_run_of_a_model_that_is_not_here_begins_with_nothing_of_the_store(worker: Worker, run: RunFolder) -> None:
    """The engine says which models there are when it gets the job."""
    run.save(5)
    leave(worker.job(REQUEST), STOPPING)
    other = Worker(worker.runtime.settings, worker.redis, run.path.parents[2] / "two", "two", checkpoints="always")

    def model(name: str) -> Any:
        raise KeyError(name)

    other.runtime.engine.model = model
    resume(other.job(REQUEST), REQUEST)
    assert not (other.home / "runs").exists()


def test_a_run_that_nobody_else_would_go_on_with_is_not_put_into_the_store(
    worker: Worker, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "wanted", lambda runtime, model: False)
    job = worker.job(REQUEST)
    run.save(5)
    leave(job, STOPPING, lambda mirror: mirror.kept())
    assert stored(worker.redis) is None
