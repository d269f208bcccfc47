"""The files of versions that were unloaded go from a worker's disk, and those of no other version."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.broker import keys, registry
from stoker.broker.connection import connect
from stoker.broker.registry import UNLOADED, UNLOADED_TTL
from stoker.settings import Settings
from workers.artifacts import Artifacts
from workers.unloaded import STAY, round_of, sweep, sweep_store

STYLE = keys.adapter("m", "style")


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    with closing(connect(broker)) as client:
        yield client
        client.delete(STYLE, keys.adapters("m"), keys.adapter("m", "other"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With files of versions 1 to 4, which a worker has made or fetched."""
    for version in range(1, 5):
        folder = tmp_path / "adapters" / "m" / "style" / str(version)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path / "adapters"


def known(redis: Any, *versions: int) -> None:
    for version in versions:
        registry.register(redis, "m", "style", version, {"rank": 8}, promote=False)


def unload(redis: Any, version: int, ago: float = STAY + 60) -> None:
    assert registry.change(redis, "m", "unload", "style", version) is not None
    redis.hincrby(STYLE, f"{UNLOADED}{version}", -int(ago))


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "m" / "style").iterdir())


def test_what_was_unloaded_goes_after_a_day_and_all_else_stays(redis: Any, root: Path) -> None:
    known(redis, 1, 2, 3)
    unload(redis, 1)
    unload(redis, 2, ago=STAY - 60)
    assert sweep(root, redis) == [root / "m" / "style" / "1"]
    assert left(root) == ["2", "3", "4"], "one was unloaded lately, one is known, and one is not this registry's"
    assert sweep(root, redis) == []


def test_what_a_registry_has_lost_is_not_taken_for_unloaded(redis: Any, root: Path) -> None:
    """This disk may have the only copy."""
    known(redis, 1, 2, 3, 4)
    redis.delete(STYLE)
    assert sweep(root, redis) == []
    known(redis, 5)
    assert sweep(root, redis) == []
    assert left(root) == ["1", "2", "3", "4"]


def test_a_version_that_a_restore_has_brought_back_stays(redis: Any, root: Path) -> None:
    known(redis, 1, 2)
    backup = redis.hgetall(STYLE)
    unload(redis, 1)
    registry.restore(redis, STYLE, backup)
    assert sweep(root, redis) == []


def test_a_record_that_another_program_wrote_over_hinders_no_other(redis: Any, root: Path) -> None:
    (root / "m" / "other" / "1").mkdir(parents=True)
    (root / "m" / "a file").write_text("x")
    (root / "no name" / "style" / "1").mkdir(parents=True)
    redis.set(keys.adapter("m", "other"), "x", ex=60)
    known(redis, 1)
    unload(redis, 1)
    redis.hset(STYLE, mapping={f"{UNLOADED}2": "long ago", f"{UNLOADED}../3": "1"})
    assert sweep(root, redis) == [root / "m" / "style" / "1"]


def running(broker: Settings, root: Path, redis: Any, **settings: Any) -> Any:
    engine = SimpleNamespace(cards=[SimpleNamespace(model="m")])
    return SimpleNamespace(
        settings=broker.model_copy(update={"home": root.parent, **settings}), redis=redis, engine=engine
    )


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_what_was_unloaded_goes_from_the_artifact_store_too(
    broker: Settings, redis: Any, root: Path, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = running(broker, root, redis, artifacts=f"{scheme}://{root.parent}/store")
    store = Artifacts(runtime.settings, redis)
    round_of(runtime)
    for model in ("m", "elsewhere"):
        for version in range(1, 5):
            store.put(model, "style", version, b"weights")
    known(redis, 1, 2, 3)
    unload(redis, 1)
    unload(redis, 2, ago=STAY - 60)
    with caplog.at_level(logging.INFO, logger="workers.unloaded"):
        round_of(runtime)
    assert [version for version in range(1, 5) if store.get("m", "style", version) is None] == [1]
    assert store.get("elsewhere", "style", 1) is not None, "its own worker looks for it"
    assert "m/style/1.safetensors: removed from the artifact store, for the version was unloaded" in caplog.messages
    caplog.clear()
    round_of(runtime)
    assert not caplog.messages


def test_another_programs_folders_in_the_store_hinder_no_adapter(broker: Settings, redis: Any, root: Path) -> None:
    runtime = running(broker, root, redis, artifacts=f"file://{root.parent}/store")
    (root.parent / "store" / "m" / "No Name").mkdir(parents=True)
    (root.parent / "store" / "m" / "file").write_text("x")
    store = Artifacts(runtime.settings, redis)
    store.put("m", "style", 1, b"weights")
    known(redis, 1)
    unload(redis, 1)
    assert sweep_store(store, ["m"], redis) == ["m/style/1.safetensors"]
    assert sweep_store(Artifacts(broker, redis), ["m"], redis) == [], "the broker keeps its own"


def test_a_round_says_what_went(broker: Settings, redis: Any, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    known(redis, 1)
    unload(redis, 1)
    runtime = running(broker, root, redis)
    with caplog.at_level(logging.INFO, logger="workers.unloaded"):
        round_of(runtime)
    assert caplog.messages == [f"{root / 'm' / 'style' / '1'}: removed, for the version was unloaded"]


def test_a_registry_does_not_remember_for_ever_what_was_unloaded(redis: Any) -> None:
    """Each worker reads it with each job of the adapter."""
    known(redis, 1, 2, 3)
    unload(redis, 1, ago=UNLOADED_TTL + 60)
    unload(redis, 2, ago=UNLOADED_TTL - 60)
    unload(redis, 3, ago=0)
    assert sorted(registry.unloaded(redis.hgetall(STYLE))) == [2, 3]
