"""Where a training job's examples come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker import keys
from stoker.connection import connect
from stoker.errors import DatasetError
from stoker.settings import Settings
from workers import datasets

LINES = b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}'


@pytest.fixture
def run(broker: Settings, tmp_path: Path) -> Iterator[Any]:
    redis = connect(broker)
    settings = SimpleNamespace(runs=tmp_path / "runs", data=tmp_path / "data")
    settings.data.mkdir()
    yield SimpleNamespace(job_id="job", runtime=SimpleNamespace(redis=redis, settings=settings))
    redis.close()


def test_a_small_upload_is_read_at_once_and_forgotten_in_the_end(run: Any) -> None:
    run.runtime.redis.set(keys.blob("dataset:job"), LINES, ex=60)
    assert datasets.fetch(run, "dataset:job") == LINES
    datasets.forget(run, "dataset:job")
    assert datasets.fetch(run, "dataset:job") in (None, b"")


def test_a_large_upload_becomes_a_file_part_by_part(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PART", 10)
    run.runtime.redis.set(keys.blob("dataset:job"), LINES, ex=60)
    path = datasets.fetch(run, "dataset:job")
    assert isinstance(path, Path)
    assert path.read_bytes() == LINES
    assert [file.name for file in path.parent.iterdir()] == ["dataset.jsonl"]
    datasets.forget(run, "dataset:job")
    assert not path.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "nowhere", "link"])
def test_a_name_that_leads_out_of_the_data_root_or_nowhere_is_refused(run: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(LINES)
    (tmp_path / "data/link").symlink_to(tmp_path / "secret")
    with pytest.raises(DatasetError, match="no such file under its data root"):
        datasets.fetch(run, f"worker:{name}")
    (tmp_path / "data/fine").write_bytes(LINES)
    assert datasets.fetch(run, "worker:fine") == tmp_path / "data/fine"
