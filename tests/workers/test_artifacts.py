"""Where adapters are kept for other workers: the broker, or anything that fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stoker import keys
from stoker.connection import connect
from stoker.errors import ConfigError, JobFailed
from stoker.settings import Settings
from workers.artifacts import Artifacts, StoreTrouble


def at(url: str) -> Artifacts:
    return Artifacts(Settings(artifacts=url), None)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_what_is_kept_is_found_by_whoever_names_the_same_store(tmp_path: Path, scheme: str) -> None:
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


def test_without_a_store_the_broker_keeps_it(broker: Settings) -> None:
    redis = connect(broker)
    store = Artifacts(broker, redis)
    store.check()
    store.put("m", "style", 1, b"first")
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

    monkeypatch.setattr(store, "_place", away)
    with pytest.raises(JobFailed, match="TimeoutError: no answer"):
        store.get("m", "style", 1)
