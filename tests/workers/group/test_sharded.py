"""Models that ranks share, by real processes over loopback: the tokens of one rank, and a part of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.lora import LoraWeights
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import load
from engine.engine import Engine
from tests.engine import shared_model, tiny
from tests.workers.group.sharded_child import MODELS, Streams, scenarios


def write(home: Path, folder: Path) -> None:
    """The models, and adapters of them: two of all layers, one of the last alone, one with norms of its own."""
    for name, args in zip(MODELS, (shared_model.ARGS, shared_model.ODD), strict=True):
        model, store = load(name, [str(shared_model.write(folder / name, args))]), AdapterStore(home / "adapters")
        for seed, adapter in enumerate(("first", "second")):
            store.write(name, adapter, tiny.adapter(model, 4, seed, size=0.5), {})
        whole, last = tiny.adapter(model, 4, 2, size=0.5), f"layers.{args.layers - 1}."
        own = {layer: sides for layer, sides in whole.matrices.items() if layer.startswith(last)}
        store.write(name, "last", LoraWeights(replace(whole.config, targets=tuple(own)), own), {})
        store.write(name, "normed", tiny.adapter(model, 4, 3, size=0.5, dora=True), {})


def alone(home: Path, folder: Path) -> dict[str, Any]:
    """What one process makes of them, in this one."""
    streams = Streams()
    models = {model: (str(folder / model),) for model in MODELS}
    engine = Engine(models, adapters=home / "adapters", publish=streams.publish)
    engine.start()
    try:
        return scenarios(engine, streams)
    finally:
        engine.stop()


def together(home: Path, folder: Path, ranks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.workers.group.sharded_child", str(home), str(folder), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_that_share_a_model_make_the_streams_of_one_rank(tmp_path: Path, ranks: int) -> None:
    home, folder = tmp_path / "home", tmp_path / "models"
    write(home, folder)
    wanted, found = alone(home, folder), together(home, folder, ranks)
    for model in MODELS:
        one, all_of_them = wanted[model], found[model]
        assert len({tuple(rows[0]) for rows in one["made"].values()}) > 4
        assert all_of_them["made"] == one["made"]
        assert all_of_them["cached"] == one["cached"] > 0
        assert all_of_them["cancelled"] == one["cancelled"] == "JobCancelled"
        both = list(zip(all_of_them["endless"], one["endless"], strict=False))
        assert len(both) > 4
        assert all(ours == theirs for ours, theirs in both)
        assert all_of_them["bytes"] <= 1.1 / ranks * one["bytes"]
        assert all_of_them["parameters"] == one["parameters"]
    assert [found[model]["shared"] for model in MODELS] == ["heads", "layers"]
