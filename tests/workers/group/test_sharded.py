"""Models that ranks share, by real processes over loopback: the tokens of one rank, and a part of its memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.adapters.lora import LoraWeights
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import load
from engine.engine import Engine
from stoker.contract import TrainRequest
from stoker.contract.dataset import TrainInput
from tests.engine import bridged, shared_model, tiny
from tests.workers.group.sharded_child import LINES, MODELS, PATIENCE, RUN, Streams, everything, losses


def write(home: Path, folder: Path, models: Sequence[str]) -> None:
    """The models, and adapters of them: two of all layers, one of the last alone, one with norms of its own."""
    shared_model.write(folder / "tiny")
    shared_model.write(folder / "odd", shared_model.ODD)
    bridged.write_folder(folder / "recurrent", "lfm2", max_position_embeddings=4096)
    store = AdapterStore(home / "adapters")
    for name in models:
        model = load(name, [str(folder / name)])
        for seed, adapter in enumerate(("first", "second")):
            store.write(name, adapter, tiny.adapter(model, 4, seed, size=0.5), {})
        whole = tiny.adapter(model, 4, 2, size=0.5)
        last = ".".join(max(whole.matrices).split(".")[:2]) + "."
        own = {layer: sides for layer, sides in whole.matrices.items() if layer.startswith(last)}
        store.write(name, "last", LoraWeights(replace(whole.config, targets=tuple(own)), own), {})
        store.write(name, "normed", tiny.adapter(model, 4, 3, size=0.5, dora=True), {})


def alone(
    home: Path, folder: Path, models: Sequence[str], do: Callable[[Engine, Streams], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """What one process makes of them, in this one."""
    streams = Streams()
    sources = {model: (str(folder / model),) for model in models}
    engine = Engine(sources, adapters=home / "adapters", publish=streams.publish)
    engine.start()
    try:
        return everything(engine, streams, models) if do is None else do(engine, streams)
    finally:
        engine.stop()


def together(home: Path, folder: Path, ranks: int, models: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.workers.group.sharded_child", str(home), str(folder), str(ranks), *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def go_on(engine: Engine, streams: Streams) -> dict[str, Any]:
    """With a run that others left."""
    engine.submit("back", TrainRequest(**RUN), TrainInput(LINES)).result(PATIENCE)
    return {"losses": losses(streams, "back")}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_that_share_a_model_make_the_streams_and_the_runs_of_one_rank(tmp_path: Path, ranks: int) -> None:
    """Each side goes on with a run that the other left in its middle."""
    home, before, folder, models = tmp_path / "home", tmp_path / "alone", tmp_path / "models", MODELS[:2]
    write(before, folder, models)
    shutil.copytree(before / "adapters", home / "adapters")
    wanted = alone(before, folder, models)
    shutil.copytree(before / "runs/left", home / "runs/begun")
    found = together(home, folder, ranks, models)
    assert_same_streams(found, wanted, models, ranks)
    shutil.move(home / "runs/left", before / "runs/back")
    # Where its turn ended behind a checkpoint, there is nothing of a pause.
    left = [path.name for path in (before / "runs/back/checkpoints").iterdir()]
    assert any(name.startswith(("paused-", "step-")) for name in left), left
    assert not any(name.startswith(f"step-{RUN['steps']:08d}") for name in left), "it was left in its middle"
    one, all_of_them = wanted["training"], found["training"]
    for runs in (all_of_them, alone(before, folder, models, go_on)):
        np.testing.assert_allclose(runs["losses"], one["losses"], rtol=1e-5)
    assert one["ended"] == {"begun": "NoneType", "left": "WorkerUnavailable", "gone": "JobCancelled"}
    assert all_of_them["ended"] == one["ended"]
    assert all_of_them["alternated"]
    assert all_of_them["stream"] == one["stream"]
    assert all_of_them["written"] == one["written"] != wanted[MODELS[0]]["made"]["greedy"][0]
    assert weights_of(home) == pytest.approx(weights_of(before), abs=1e-4)
    assert_same_runs(found, wanted, MODELS[1])


def assert_same_runs(found: dict[str, Any], wanted: dict[str, Any], model: str) -> None:
    """Of a model whose layers ranks share."""
    one, all_of_them = wanted[f"training on {model}"], found[f"training on {model}"]
    np.testing.assert_allclose(all_of_them["losses"], one["losses"], rtol=1e-5)
    assert len(one["losses"]) == 3
    assert all_of_them["stream"] == one["stream"]
    assert all_of_them["written"] == one["written"] != wanted[model]["made"]["greedy"][0]


def weights_of(home: Path) -> np.ndarray:
    """What the run of `training` has trained."""
    shapes = shared_model.whole().linear_shapes
    matrices = AdapterStore(home / "adapters").read(MODELS[0], "style", 1, shapes).matrices
    return np.concatenate([np.array(side).ravel() for _, sides in sorted(matrices.items()) for side in sides.values()])


def assert_same_streams(found: dict[str, Any], wanted: dict[str, Any], models: Sequence[str], ranks: int) -> None:
    for model in models:
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
        assert all_of_them["shared"] == ("heads" if model == MODELS[0] else "layers")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_layers_of_a_file_of_mlx_lm_make_the_streams_and_runs_of_one_rank(
    tmp_path: Path, ranks: int
) -> None:
    home, folder, models = tmp_path / "home", tmp_path / "models", MODELS[2:]
    write(home, folder, models)
    found, wanted = together(home, folder, ranks, models), alone(home, folder, models)
    assert_same_streams(found, wanted, models, ranks)
    assert_same_runs(found, wanted, MODELS[2])
