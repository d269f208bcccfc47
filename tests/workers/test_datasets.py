"""Where a training job's examples come from."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.contract.dataset import TrainInput
from stoker.contract.uploads import Kind, Upload
from stoker.errors import DatasetError, InvalidRequest, JobLost
from stoker.files.durable import DRAFT
from stoker.settings import Settings
from workers import adapters, datasets, uploads

LINES = b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}'


@pytest.fixture
def run(broker: Settings, tmp_path: Path) -> Iterator[Any]:
    redis = connect(broker)
    settings = SimpleNamespace(runs=tmp_path / "runs", data=tmp_path / "data")
    settings.data.mkdir()
    with ExitStack() as resources:
        yield SimpleNamespace(id="job", runtime=SimpleNamespace(redis=redis, settings=settings), resources=resources)
    redis.close()


def sent(run: Any) -> str:
    name = str(Upload.of("dataset", run.id, LINES))
    run.runtime.redis.set(keys.blob(name), LINES, ex=60)
    return name


def test_a_small_upload_is_read_at_once_and_an_expired_one_is_none(run: Any) -> None:
    name = sent(run)
    assert datasets.fetch(run, name) == LINES
    run.runtime.redis.delete(keys.blob(name))
    assert datasets.fetch(run, name) is None


def test_a_large_upload_that_expired_is_none_and_no_file(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PART", 10)
    name = sent(run)
    run.runtime.redis.delete(keys.blob(name))
    assert datasets.fetch(run, name) is None
    assert not list(run.runtime.settings.runs.rglob("*.jsonl"))


def test_a_large_upload_becomes_a_file_part_by_part(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PART", 10)
    name = sent(run)
    path = datasets.fetch(run, name)
    assert isinstance(path, Path)
    assert path.read_bytes() == LINES
    assert [file.name for file in path.parent.iterdir()] == ["dataset.jsonl"]
    run.resources.close()
    assert list(run.runtime.settings.runs.rglob("*")) == [run.runtime.settings.runs / "job"]
    again = datasets.fetch(run, name)
    assert isinstance(again, Path)
    assert again.read_bytes() == LINES, "another worker may need the upload: it stays until the job has ended"


def test_who_was_overtaken_leaves_the_dataset_of_the_next_owner_in_the_same_home(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "PART", 10)
    name = sent(run)
    with ExitStack() as late:
        overtaken: Any = SimpleNamespace(id=run.id, runtime=run.runtime, resources=late)
        datasets.fetch(overtaken, name)
        own = datasets.fetch(run, name)
    assert isinstance(own, Path)
    assert own.read_bytes() == LINES
    # Nor does one that comes late sweep it.
    with ExitStack() as late:
        overtaken.resources = late
        datasets.fetch(overtaken, name)
    assert own.read_bytes() == LINES


def test_what_a_delivery_that_died_has_left_goes_with_the_next_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PART", 10)
    left = run.runtime.settings.runs / run.id / f"{DRAFT}dead"
    left.mkdir(parents=True)
    (left / "dataset.jsonl").write_bytes(LINES)
    own = datasets.fetch(run, sent(run))
    assert list(run.runtime.settings.runs.rglob("*.jsonl")) == [own]


def test_a_fetch_that_the_broker_breaks_off_leaves_nothing_while_the_job_goes_on(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched again, and may be large."""
    monkeypatch.setattr(keys, "PART", 10)

    def broken(*_: Any) -> Iterator[bytes]:
        yield LINES[:10]
        raise RedisConnectionError("gone")

    monkeypatch.setattr(uploads, "parts", broken)
    with pytest.raises(RedisConnectionError):
        datasets.fetch(run, sent(run))
    assert list(run.runtime.settings.runs.rglob("*.jsonl")) == []


def test_a_file_that_cannot_be_deleted_does_not_end_the_job_otherwise_and_goes_later(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "PART", 10)
    left = datasets.fetch(run, sent(run))
    assert isinstance(left, Path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        run.resources.close()
    assert left.exists()
    datasets.fetch(run, sent(run))
    assert not left.exists()


@pytest.mark.parametrize("part", [10, 1000])
@pytest.mark.parametrize("found", [b"", LINES[:-1], LINES + b"x", LINES[:20] + bytes(len(LINES) - 20), LINES[::-1]])
def test_an_upload_that_is_not_what_was_sent_ends_its_job_and_leaves_no_file(
    run: Any, monkeypatch: pytest.MonkeyPatch, part: int, found: bytes
) -> None:
    monkeypatch.setattr(keys, "PART", part)
    name = sent(run)
    run.runtime.redis.set(keys.blob(name), found, ex=60)
    with pytest.raises(JobLost, match=r"not whole|not what was sent"):
        datasets.fetch(run, name)
    assert [path for path in run.runtime.settings.runs.rglob("*") if path.is_file()] == []


def test_an_upload_whose_name_promises_a_terabyte_is_not_asked_for_in_a_hundred_thousand_parts(run: Any) -> None:
    asked: list[int] = []

    def getrange(key: str, start: int, end: int) -> bytes:
        asked.append(start)
        return LINES[start : end + 1]

    upload = Upload("dataset", run.id, "0" * 16, 10**12 - 1, "0" * 64)
    with pytest.raises(JobLost, match="not whole"):
        list(uploads.parts(SimpleNamespace(getrange=getrange), upload))
    assert asked == [0]


def test_a_byte_behind_the_last_part_is_seen(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = sent(run)
    monkeypatch.setattr(keys, "PART", len(LINES))
    run.runtime.redis.append(keys.blob(name), b"x")
    with pytest.raises(JobLost, match="not whole"):
        datasets.fetch(run, name)


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_an_upload_of_another_job_or_any_other_key_is_refused(run: Any, kind: Kind) -> None:
    own = str(Upload.of(kind, "job", LINES))
    others = [str(Upload.of(kind, "other", LINES)), str(Upload.of(kind, "job:x", LINES)), f"{kind}:job", "vectors:job"]
    for name in (*others, own + "0", own.upper(), own + "\n", "../../x", "", f"{kind}:job:::"):
        run.runtime.redis.set(keys.blob(name), LINES, ex=60)
        with pytest.raises(InvalidRequest, match="given; allowed: an upload of this very job"):
            datasets.fetch(run, name) if kind == "dataset" else adapters.unpacked(run, name).__enter__()
    run.runtime.redis.flushall()
    for hostile in ("../../x", "/abs", "job\n"):
        run.id = hostile
        with pytest.raises(InvalidRequest, match="job id"):
            datasets.fetch(run, str(Upload.of("dataset", hostile, LINES)))


def test_an_adapter_that_is_not_whole_is_no_adapter(run: Any) -> None:
    name = str(Upload.of("adapter", "job", LINES))
    run.runtime.redis.set(keys.blob(name), LINES[:-1], ex=60)
    with pytest.raises(JobLost, match="its adapter is not whole"):
        adapters.unpacked(run, name).__enter__()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "nowhere", "link", "", ".", "a\0b", "fifo", "zero"])
def test_a_name_that_leads_out_of_the_data_root_or_nowhere_is_refused(run: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(LINES)
    (tmp_path / "data/link").symlink_to(tmp_path / "secret")
    (tmp_path / "data/zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "data/fifo")
    with pytest.raises(DatasetError, match="no such file under its data root"):
        datasets.fetch(run, f"worker:{name}")
    (tmp_path / "data/fine").write_bytes(LINES)
    found = datasets.fetch(run, "worker:fine")
    assert found is not None
    assert b"".join(TrainInput(found).lines()) == LINES


def test_a_file_of_a_worker_that_has_no_data_root_is_refused_with_what_to_set(run: Any) -> None:
    run.runtime.settings.data = None
    with pytest.raises(DatasetError, match=r"'fine' of the worker named; this one has no data root. Set STOKER_DATA"):
        datasets.fetch(run, "worker:fine")


def test_a_file_that_is_exchanged_for_a_link_before_it_is_read_gives_nothing_away(run: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b'{"text": "secret"}')
    (tmp_path / "data/fine").write_bytes(LINES)
    found = datasets.fetch(run, "worker:fine")
    assert found is not None
    (tmp_path / "data/fine").unlink()
    (tmp_path / "data/fine").symlink_to(tmp_path / "secret")
    with pytest.raises(DatasetError, match=r"fine: cannot be read \(leads out of its root\)"):
        list(TrainInput(found).lines())
