"""Models that ranks share, by real processes over loopback: the tokens of one rank, and a part of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import load
from engine.engine import Engine
from tests.engine import shared_model, tiny
from tests.workers.group.sharded_child import NAME, Streams, scenario


def alone(home: Path, model: Path) -> dict[str, Any]:
    """What one process makes of it, in this one."""
    streams = Streams()
    engine = Engine({NAME: (str(model),)}, adapters=home / "adapters", publish=streams.publish)
    engine.start()
    try:
        return scenario(engine, streams)
    finally:
        engine.stop()


def shared(home: Path, model: Path, ranks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.workers.group.sharded_child", str(home), str(model), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_that_share_a_model_make_the_streams_of_one_rank(tmp_path: Path, ranks: int) -> None:
    home, folder = tmp_path / "home", shared_model.write(tmp_path / "model")
    model = load(NAME, [str(folder)])
    for seed, name in enumerate(("first", "second")):
        AdapterStore(home / "adapters").write(NAME, name, tiny.adapter(model, 4, seed, size=0.5), {})
    one, all_of_them = alone(home, folder), shared(home, folder, ranks)
    assert len({tuple(rows[0]) for rows in one["made"].values()}) > 4
    assert all_of_them["made"] == one["made"]
    assert all_of_them["cached"] == one["cached"] > 0
    assert all_of_them["cancelled"] == one["cancelled"] == "JobCancelled"
    both = list(zip(all_of_them["endless"], one["endless"], strict=False))
    assert len(both) > 4
    assert all(ours == theirs for ours, theirs in both)
    assert all_of_them["bytes"] <= 1.1 / ranks * one["bytes"]
    assert all_of_them["parameters"] == one["parameters"]
