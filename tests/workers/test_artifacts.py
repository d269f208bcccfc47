"""Where adapters are kept for other workers: the broker, or anything that fsspec knows."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.errors import ConfigError, JobFailed
from stoker.files import durable
from stoker.settings import Settings
from tests import bucket, powercut
from workers import artifacts
from workers.artifacts import Artifacts, StoreTrouble


def at(url: str) -> Artifacts:
    return Artifacts(Settings(artifacts=url), None)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_what_is_kept_is_found_by_every_worker_of_the_same_store(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{tmp_path}/store"
    assert at(url).get("m", "style", 1) is None
    at(url).put("m", "style", 1, b"first")
    at(url).put("m", "style", 1, b"never written over")
    at(url).put("m", "style", 2, b"second")
    assert [at(url).get("m", "style", version) for version in (1, 2, 3)] == [b"first", b"second", None]
    if scheme == "file":
        assert sorted(path.name for path in (tmp_path / "store/m/style").iterdir()) == [
            "1.safetensors",
            "2.safetensors",
        ]


@pytest.mark.parametrize("scheme", ["bucket", "simplecache::bucket"])
def test_a_version_that_another_process_made_is_found_though_the_folder_was_listed_before(
    tmp_path: Path, scheme: str
) -> None:
    url = f"{scheme}://{tmp_path}"
    at(f"bucket://{tmp_path}").put("m", "style", 1, b"first")
    assert at(url).newest("m", "style") == 1
    bucket.another_process_writes(f"{tmp_path}/m/style/2.safetensors", b"second")
    assert at(url).newest("m", "style") == 2
    assert at(url).get("m", "style", 2) == b"second"


def test_a_store_that_knows_no_options_is_used_as_it_is(tmp_path: Path) -> None:
    at(f"strict://{tmp_path}").put("m", "style", 1, b"first")
    assert at(f"strict://{tmp_path}").get("m", "style", 1) == b"first"


def test_a_shared_folder_has_a_version_whole_or_not_whenever_the_power_fails(tmp_path: Path) -> None:
    """What was kept is registered next, and the run that made it ends."""
    (tmp_path / "disk").mkdir()
    with powercut.recorded(tmp_path / "disk") as disk:
        for version, data in ((1, b"first" * 9), (2, b"second" * 9)):
            at(f"file://{tmp_path}/disk/store").put("m", "style", version, data)
            disk.mark(str(version))
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            found = [at(f"file://{after}/store").get("m", "style", version) for version in (1, 2)]
            assert found in ([None, None], [b"first" * 9, None], [b"first" * 9, b"second" * 9]), cut
            assert 2 - found.count(None) >= len(cut.marks), cut


def test_a_version_that_a_dead_writer_put_there_is_on_disk_when_the_next_finds_it(tmp_path: Path) -> None:
    def die(_: Path) -> None:
        raise KeyboardInterrupt

    (tmp_path / "disk/m/style").mkdir(parents=True)
    with powercut.recorded(tmp_path / "disk") as disk:
        with pytest.MonkeyPatch.context() as patch:
            plain = durable.flush
            patch.setattr(durable, "flush", lambda path: die(path) if path.is_dir() else plain(path))
            with pytest.raises(KeyboardInterrupt):
                at(f"file://{tmp_path}/disk").put("m", "style", 1, b"first")
        at(f"file://{tmp_path}/disk").put("m", "style", 1, b"first")
    assert all(cut.tree["m/style/1.safetensors"] == b"first" for cut in disk.cuts() if cut.finished)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_shared_folder_that_takes_nothing_more_is_named_and_takes_it_later(tmp_path: Path, error: int) -> None:
    store = at(f"file://{tmp_path}/store")
    raised = list(powercut.each_refusal(error, lambda: store.put("m", "style", 1, b"first")))
    assert len(raised) > 4
    for trouble in filter(None, raised):
        assert isinstance(trouble, StoreTrouble)
        assert os.strerror(error) in str(trouble)
    assert at(f"file://{tmp_path}/store").get("m", "style", 1) == b"first"
    assert [path.name for path in (tmp_path / "store/m/style").iterdir()] == ["1.safetensors"]


def test_drafts_of_writers_that_died_are_deleted_from_a_store_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, root = fsspec.core.url_to_fs(f"memory://{tmp_path}")
    for name in ("1.safetensors.dead", "11.safetensors.other"):
        fs.pipe_file(f"{root}/m/style/{name}", b"half")
    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "mv", lambda *_: (_ for _ in ()).throw(OSError("no route")))
        with pytest.raises(StoreTrouble, match="no route"):
            at(f"memory://{tmp_path}").put("m", "style", 1, b"first")
    assert at(f"memory://{tmp_path}").get("m", "style", 1) is None
    at(f"memory://{tmp_path}").put("m", "style", 1, b"first")
    left = sorted(path.rpartition("/")[2] for path in fs.ls(f"{root}/m/style", detail=False))
    assert left == ["1.safetensors", "11.safetensors.other"]


def test_a_writer_whose_draft_was_swept_by_a_faster_one_has_done_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, root = fsspec.core.url_to_fs(f"memory://{tmp_path}")
    plain = type(fs).mv

    def late(self: Any, draft: str, path: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(fs), "mv", plain)
            at(f"memory://{tmp_path}").put("m", "style", 1, b"first")
        plain(self, draft, path)

    monkeypatch.setattr(type(fs), "mv", late)
    at(f"memory://{tmp_path}").put("m", "style", 1, b"first")
    assert [path.rpartition("/")[2] for path in fs.ls(f"{root}/m/style", detail=False)] == ["1.safetensors"]


def test_without_a_store_the_broker_keeps_it(broker: Settings) -> None:
    redis = connect(broker)
    store = Artifacts(broker, redis)
    store.check()
    store.put("m", "style", 1, b"first")
    store.put("m", "style", 1, b"never written over")
    assert store.get("m", "style", 1) == b"first"
    assert store.get("m", "style", 2) is None
    redis.delete(keys.artifact("m", "style", 1))
    redis.close()


def test_a_store_that_this_installation_cannot_use_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="STOKER_ARTIFACTS"):
        at("nonsense://bucket").check()


def test_a_store_that_fails_is_named_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreTrouble, match=r"artifact store file://.* \(STOKER_ARTIFACTS\) cannot be used"):
        at(f"file://{tmp_path}/file").put("m", "style", 1, b"x")
    store = at(f"file://{tmp_path}")

    def away(*_: Any) -> Any:
        raise TimeoutError("no answer")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.exists", away)
    with pytest.raises(JobFailed, match="TimeoutError: no answer"):
        store.get("m", "style", 1)


def test_the_newest_version_in_the_broker_is_found_however_many_there_are(
    broker: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "STRIDE", 3)
    with connect(broker) as redis:
        store = Artifacts(broker, redis)
        assert store.newest("m", "style") == 0
        for version in (1, 2, 3, 4, 7, 8):
            store.put("m", "style", version, b"x")
        assert store.newest("m", "style") == 8, "three and no more may lie between"
        store.put("m", "style", 12, b"x")
        assert store.newest("m", "style") == 8
        redis.delete(*(keys.artifact("m", "style", version) for version in (1, 2, 3, 4, 7, 8, 12)))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_the_newest_version_is_the_highest_number(tmp_path: Path, scheme: str) -> None:
    store = at(f"{scheme}://{tmp_path}/store")
    assert store.newest("m", "style") == 0
    for version in (9, 10, 2):
        store.put("m", "style", version, b"x")
    fs, root = fsspec.core.url_to_fs(f"{scheme}://{tmp_path}/store")
    for name in ("99.safetensors.half", "0100.safetensors", "notes.txt"):
        fs.pipe_file(f"{root}/m/style/{name}", b"of another program")
    assert store.newest("m", "style") == 10


@pytest.mark.parametrize("refused", ["rm_file", "rm", "ls"])
def test_a_store_that_deletes_nothing_keeps_no_run_and_no_version_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    """What is not needed any more only takes room."""
    store = at(f"memory://{tmp_path}/store")
    folder = store.folder(".runs/job")
    assert folder is not None
    folder.put("part", b"x")
    fs, _ = fsspec.core.url_to_fs(f"memory://{tmp_path}/store")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(type(fs), refused, refuse)
    with caplog.at_level("INFO", logger="workers.artifacts"):
        folder.remove(["part", "another"])
        folder.clear()
        assert store.put("m", "style", 1, b"first")
    assert store.get("m", "style", 1) == b"first"
    assert "could not be deleted" in caplog.text
    assert "not allowed" in caplog.text or "another" in caplog.text
