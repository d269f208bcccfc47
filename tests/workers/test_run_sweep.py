"""What runs have left in a store that is no broker goes, and nothing that a run may need."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from stoker.broker import keys
from stoker.settings import Settings
from workers.artifacts import Artifacts
from workers.run_sweep import round_of, sweep


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_of_a_shared_store_only_what_no_run_needs_is_swept(
    broker: Settings, redis: Any, tmp_path: Path, scheme: str
) -> None:
    settings = broker.model_copy(update={"artifacts": f"{scheme}://{tmp_path}/store"})
    store = Artifacts(settings, redis)
    for job_id in ("running", "letter", "cancelled", "beginning"):
        folder = store.folder(f".runs/{job_id}")
        assert folder is not None
        folder.put("part", b"x")
    for job_id in ("running", "letter"):
        redis.hset(keys.checkpoint(job_id), "manifest", b"x")
        redis.expire(keys.checkpoint(job_id), 60)
    for job_id in ("letter", "cancelled"):
        redis.set(keys.result(job_id), b"{}", ex=60)
    assert store.put("m", "style", 1, b"an adapter")
    assert sweep(settings, redis, time.time()) == ["cancelled"]
    month = keys.DEAD_TTL + 60
    assert sweep(settings, redis, time.time() + month) == ["beginning"], "or another broker's"
    home = store.folder(".runs")
    assert home is not None
    assert sorted(home.names()) == ["letter", "running"]
    assert store.get("m", "style", 1) == b"an adapter"


def test_a_round_sweeps_by_the_clock_of_this_machine_and_says_what_went(
    broker: Settings, redis: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file's age is by the clock of who wrote it, not by the broker's."""
    settings = broker.model_copy(update={"artifacts": f"file://{tmp_path}/store"})
    for job_id in ("cancelled", "beginning"):
        folder = Artifacts(settings, redis).folder(f".runs/{job_id}")
        assert folder is not None
        folder.put("part", b"x")
    redis.set(keys.result("cancelled"), b"{}", ex=60)
    runtime: Any = SimpleNamespace(settings=settings, redis=redis)
    with caplog.at_level(logging.INFO, logger="workers.run_sweep"):
        round_of(runtime)
    assert [record.message for record in caplog.records] == [
        "job cancelled: its checkpoints were deleted from the store; the run has ended"
    ]
    assert [path.name for path in (tmp_path / "store/.runs").iterdir()] == ["beginning"]


def test_a_folder_that_cannot_be_looked_at_keeps_no_other_from_being_swept(
    broker: Settings, redis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = broker.model_copy(update={"artifacts": f"file://{tmp_path}/store"})
    for job_id in ("a", "closed", "z"):
        folder = Artifacts(settings, redis).folder(f".runs/{job_id}")
        assert folder is not None
        folder.put("part", b"x")
    ls = LocalFileSystem.ls

    def refusing(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("/closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return ls(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", refusing)
    assert sorted(sweep(settings, redis, time.time() + keys.DEAD_TTL + 60)) == ["a", "z"]
    assert "job closed: whether its checkpoints are needed cannot be seen" in caplog.text


def test_without_a_store_of_its_own_there_is_nothing_to_sweep(broker: Settings, redis: Any) -> None:
    assert sweep(broker, redis, time.time()) == []
