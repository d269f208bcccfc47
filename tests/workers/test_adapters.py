"""Adapters between registry, artifact store and this worker's disk: kept before they are known, one version a job."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.adapters.store import AdapterStore
from stoker.broker import keys, registry
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.contract import bundle
from stoker.contract.uploads import Upload
from stoker.errors import InvalidRequest, UnknownAdapter, WorkerUnavailable
from stoker.files.durable import DRAFT
from stoker.settings import Settings
from workers import adapters
from workers.artifacts import Artifacts, StoreTrouble
from workers.services.runtime import Fenced

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "stoker.json": b"{}"}


class Home:
    """A worker's side of one broker: its disk, and its jobs."""

    def __init__(self, settings: Settings, redis: Any, root: Path) -> None:
        self.redis, self.settings, self.store = redis, settings, AdapterStore(root / "adapters")
        self.forgotten: list[tuple[str, str, int]] = []
        self.checked: list[tuple[str, str, int]] = []

    def run(self, job_id: str) -> Any:
        self.redis.hset(keys.job(job_id), mapping={Field.KIND: "generate", Field.TOKEN: "token"})
        self.redis.expire(keys.job(job_id), 60)
        engine = SimpleNamespace(
            store=self.store,
            forget=lambda *version: self.forgotten.append(version),
            check_files=lambda *version: self.checked.append(version),
        )
        runtime = SimpleNamespace(redis=self.redis, settings=self.settings, engine=engine, name="w@here")
        return SimpleNamespace(id=job_id, runtime=runtime, token="token")

    def write(self, version: int | None = None, job: str = "", weights: bytes = b"weights") -> int:
        files = {**FILES, "adapter_model.safetensors": weights}
        if job:
            files["stoker.json"] = json.dumps({"job": job}).encode()

        def fill(draft: Path) -> None:
            for name, content in files.items():
                (draft / name).write_bytes(content)

        return self.store.install("m", "style", fill, version)

    def publish(self, version: int, *, promote: bool = True) -> None:
        adapters.publish(self.run("trains"), "m", "style", version, {}, promote=promote)

    @property
    def entry(self) -> registry.AdapterEntry:
        return registry.parse("m", "style", self.redis.hgetall(keys.adapter("m", "style")))


@pytest.fixture
def home(broker: Settings, tmp_path: Path) -> Iterator[Home]:
    redis = connect(broker)
    yield Home(broker, redis, tmp_path / "here")
    redis.delete(keys.adapter("m", "style"), keys.adapters("m"), *(keys.artifact("m", "style", n) for n in (1, 2, 3)))
    redis.close()


def elsewhere(home: Home, tmp_path: Path) -> Home:
    return Home(home.settings, home.redis, tmp_path / "elsewhere")


def test_a_version_is_kept_for_all_workers_before_it_is_known(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StoreTrouble("no room")

    home.write()
    with monkeypatch.context() as patch:
        patch.setattr(Artifacts, "put", full)
        with pytest.raises(StoreTrouble):
            home.publish(1)
    assert home.entry.versions == {}
    home.publish(1)
    assert home.entry.serving == 1
    facts = home.entry.versions[1]
    assert (facts["worker"], facts["job"]) == ("w@here", "trains")


def test_a_job_keeps_the_version_that_its_first_owner_chose(home: Home, tmp_path: Path) -> None:
    for version in (1, 2):
        home.write()
        home.publish(version, promote=version == 1)
    assert adapters.pinned(home.run("a"), "m", "style") == "style@1"
    registry.change(home.redis, "m", "promote", "style", 2)
    assert adapters.pinned(elsewhere(home, tmp_path).run("a"), "m", "style") == "style@1"
    assert adapters.pinned(home.run("b"), "m", "style") == "style@2"
    assert adapters.pinned(home.run("c"), "m", "style@1") == "style@1"


def test_a_job_keeps_its_version_also_when_none_serves_any_more(home: Home) -> None:
    home.write()
    home.publish(1)
    assert adapters.pinned(home.run("job"), "m", "style") == "style@1"
    registry.change(home.redis, "m", "deactivate", "style", None)
    assert adapters.pinned(home.run("job"), "m", "style") == "style@1"


def test_of_two_owners_that_choose_at_once_the_second_takes_what_the_first_wrote(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2):
        home.write()
        home.publish(version)
    plain = registry.parse

    def slow(*arguments: Any) -> registry.AdapterEntry:
        home.redis.hset(keys.job("a"), Field.VERSION, 1)
        return plain(*arguments)

    monkeypatch.setattr(registry, "parse", slow)
    assert adapters.pinned(home.run("a"), "m", "style") == "style@1"


def test_a_worker_fetches_what_it_does_not_hold_and_nothing_twice(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write()
    home.publish(1)
    other = elsewhere(home, tmp_path)
    adapters.pinned(other.run("a"), "m", "style")
    folder = other.store.folder("m", "style", 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    monkeypatch.setattr(Artifacts, "get", lambda *_: pytest.fail("it is there"))
    assert not other.checked
    adapters.pinned(other.run("b"), "m", "style")
    assert other.checked == [("m", "style", 1)], "another worker of the home may have put them there"


def test_files_that_another_registry_gave_the_same_number_serve_nobody_and_are_not_lost(
    home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that served by itself before has versions of its own on its disk: every one of them begins at 1."""
    home.write(job="trains")
    home.publish(1)
    other = elsewhere(home, tmp_path)
    folder = other.store.folder("m", "style", other.write(job="before", weights=b"of before"))
    assert adapters.pinned(other.run("a"), "m", "style") == "style@1"
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert other.forgotten == [("m", "style", 1)], "what is in memory is not theirs either"
    (aside,) = folder.parent.glob("1-*")
    assert (aside / "adapter_model.safetensors").read_bytes() == b"of before"
    assert f"were of the job 'before', those of the registry are of 'trains'; the first are in {aside}" in caplog.text
    assert other.store.newest("m", "style") == 1


def test_two_jobs_at_once_that_need_other_files_of_a_version_both_get_them(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds the files gone that it was to put aside, or asks for the version before memory lets go of it."""
    home.write(job="trains")
    home.publish(1)
    other = elsewhere(home, tmp_path)
    other.write(job="before", weights=b"of before")
    begun, ended, plain = threading.Event(), threading.Event(), other.store.set_aside
    answers: list[str] = []

    def second() -> None:
        begun.wait(30)
        answers.append(adapters.pinned(other.run("b"), "m", "style"))
        answers.append(str(other.forgotten))
        ended.set()

    def set_aside(*given: Any) -> Path:
        found = plain(*given)
        begun.set()
        # Unless it waits for this one, it is through before memory has let go.
        ended.wait(0.2)
        return found

    monkeypatch.setattr(other.store, "set_aside", set_aside)
    thread = threading.Thread(target=second)
    thread.start()
    assert adapters.pinned(other.run("a"), "m", "style") == "style@1"
    thread.join(30)
    assert answers == ["style@1", "[('m', 'style', 1)]"]


def test_files_that_another_worker_of_the_home_puts_aside_at_the_same_time_end_no_job(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(job="trains")
    home.publish(1)
    other = elsewhere(home, tmp_path)
    folder = other.store.folder("m", "style", other.write(job="before", weights=b"of before"))
    plain = other.store.set_aside

    def set_aside(*given: Any) -> Path:
        plain(*given)
        return plain(*given)

    monkeypatch.setattr(other.store, "set_aside", set_aside)
    assert adapters.pinned(other.run("a"), "m", "style") == "style@1"
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert other.forgotten == [("m", "style", 1)]


def test_files_that_another_registry_gave_the_same_number_stay_while_no_store_has_the_registered_ones(
    home: Home, tmp_path: Path
) -> None:
    home.write(job="trains")
    home.publish(1)
    home.redis.delete(keys.artifact("m", "style", 1))
    other = elsewhere(home, tmp_path)
    other.write(job="before")
    with pytest.raises(UnknownAdapter, match="no store that this worker reaches has its files"):
        adapters.pinned(other.run("a"), "m", "style")
    assert other.store.has("m", "style", 1)


def test_a_run_that_moves_to_a_disk_with_other_files_of_its_number_makes_its_own(home: Home, tmp_path: Path) -> None:
    """Else it would end with those, in silence: a version that is there stays as it is."""
    other = elsewhere(home, tmp_path)
    other.write(job="before", weights=b"of before")
    assert adapters.allocate(home.run("a"), "m", "style") == 1
    assert adapters.allocate(other.run("a"), "m", "style") == 1
    assert other.write(1, job="a") == 1
    folder = other.store.folder("m", "style", 1)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert adapters.allocate(other.run("a"), "m", "style") == 1
    assert folder.is_dir(), "it is its own"


def test_a_version_whose_files_are_gone_or_damaged_is_named_and_leaves_nothing(home: Home, tmp_path: Path) -> None:
    home.write()
    home.publish(1)
    other = elsewhere(home, tmp_path)
    home.redis.set(keys.artifact("m", "style", 1), b"12345678")
    with pytest.raises(InvalidRequest, match="style@1: no bundle"):
        adapters.pinned(other.run("a"), "m", "style")
    home.redis.delete(keys.artifact("m", "style", 1))
    with pytest.raises(UnknownAdapter, match="'style@1' given; it is registered, and no store"):
        adapters.pinned(other.run("a"), "m", "style")
    assert not other.store.has("m", "style", 1)
    assert not list((tmp_path / "elsewhere").rglob(f"{DRAFT}*"))


def test_a_new_version_is_above_all_on_this_disk_and_the_same_for_its_job(home: Home, tmp_path: Path) -> None:
    home.write(5)
    assert adapters.allocate(home.run("a"), "m", "style") == 6
    assert adapters.allocate(elsewhere(home, tmp_path).run("b"), "m", "style") == 7
    assert adapters.allocate(home.run("a"), "m", "style") == 6


def test_what_is_loaded_lies_in_a_folder_for_as_long_as_its_job_takes(home: Home) -> None:
    run = home.run("a")
    data = bundle.pack(FILES, "/clients/mine")
    upload = str(Upload.of("adapter", "a", data))
    with adapters.unpacked(run, upload) as found:
        assert found is None, "it has expired"
    home.redis.set(keys.blob(upload), data, ex=60)
    with adapters.unpacked(run, upload) as found:
        assert found is not None
        folder, source = found
        assert source == "/clients/mine"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert not folder.exists()


@pytest.mark.parametrize("store", ["broker", "folder"])
def test_a_version_after_a_lost_record_is_above_every_artifact(home: Home, tmp_path: Path, store: str) -> None:
    if store == "folder":
        home.settings = home.settings.model_copy(update={"artifacts": f"file://{tmp_path}/shared"})
    for _ in (1, 2):
        home.publish(home.write())
    home.redis.delete(keys.adapter("m", "style"))
    other = elsewhere(home, tmp_path)
    assert adapters.allocate(other.run("new"), "m", "style") == 3
    assert adapters.allocate(other.run("new"), "m", "style") == 3
    assert adapters.allocate(other.run("next"), "m", "style") == 4


def test_another_adapter_begins_with_one_version(home: Home) -> None:
    home.publish(home.write())
    try:
        assert adapters.allocate(home.run("first"), "m", "other") == 1
    finally:
        home.redis.delete(keys.adapter("m", "other"))


def overtake(home: Home, job_id: str = "trains") -> None:
    home.redis.hset(keys.job(job_id), Field.TOKEN, "another owner")


def publish_of(home: Home, run: Any, version: int = 1) -> None:
    adapters.publish(run, "m", "style", version, {}, promote=True)


def left(home: Home, tmp_path: Path) -> list[str]:
    """What is there of the version: known, kept, on this disk."""
    found = ["known"] if home.entry.versions else []
    kept = home.redis.exists(keys.artifact("m", "style", 1)) or list((tmp_path / "shared").rglob("1.safetensors"))
    return found + (["kept"] if kept else []) + (["here"] if home.store.has("m", "style", 1) else [])


@pytest.mark.parametrize("store", ["broker", "folder"])
def test_a_worker_that_was_overtaken_leaves_no_version_anywhere(home: Home, tmp_path: Path, store: str) -> None:
    if store == "folder":
        home.settings = home.settings.model_copy(update={"artifacts": f"file://{tmp_path}/shared"})
    run = home.run("trains")
    home.write(1)
    overtake(home)
    with pytest.raises(Fenced):
        publish_of(home, run)
    assert left(home, tmp_path) == []


def test_a_worker_that_is_overtaken_between_store_and_registry_makes_nothing_known(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = home.run("trains"), registry.keep
    home.write(1)

    def keep(*given: Any) -> bool:
        kept = plain(*given)
        overtake(home)
        return kept

    monkeypatch.setattr(registry, "keep", keep)
    with pytest.raises(Fenced):
        publish_of(home, run)
    # Its files it put there while the run was its own: they are what the next owner makes under this number.
    assert left(home, tmp_path) == ["kept"]


def test_a_version_that_the_next_owner_made_on_the_same_disk_stays(home: Home, tmp_path: Path) -> None:
    run = home.run("trains")
    home.write(1)
    home.publish(1)
    overtake(home)
    with pytest.raises(Fenced):
        publish_of(home, run)
    assert left(home, tmp_path) == ["known", "kept", "here"]


def test_a_job_whose_version_was_taken_back_on_its_own_disk_makes_it_again(home: Home) -> None:
    with pytest.raises(WorkerUnavailable, match="The job makes it again"):
        publish_of(home, home.run("trains"))
    assert home.entry.versions == {}
