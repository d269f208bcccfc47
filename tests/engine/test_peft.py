"""Against torch with peft: the same runs, and adapters that either side reads of the other."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from engine.adapters import mlx_lm, peft
from engine.adapters.lora import LoraWeights, initialise
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.models.bridge.linears import adapter_name
from engine.training import trainer as trainer_module
from engine.training.data import TokenizedExample
from engine.training.trainer import Trainer
from engine.weights import safetensors
from stoker.errors import ModelError
from tests.engine import bridged, tiny
from tests.engine.test_training import Given, example, finish

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = ("lora", "dora", "lora-accumulation", "dora-smoothing")
PEERS = Path(__file__).parents[2] / ".venv-peers/bin/python"


def golden(name: str) -> tuple[dict[str, Any], Any]:
    return json.loads((GOLDENS / f"peft/{name}.json").read_text()), np.load(GOLDENS / f"peft/{name}.npz")


def micro_batches(record: dict[str, Any]) -> list[list[TokenizedExample]]:
    return [[example(row["tokens"], row["start"]) for row in part] for step in record["batches"] for part in step]


def logits(model: LoadedModel, adapters: Any, probe: list[int]) -> np.ndarray:
    return np.array(model.decoder.logits(model.decoder(mx.array([probe]), adapters=adapters))[0])


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_peft_for_thirty_steps(
    monkeypatch: pytest.MonkeyPatch, golden_model: LoadedModel, name: str
) -> None:
    record, arrays = golden(name)
    parts = micro_batches(record)

    def start(*arguments: Any) -> LoraWeights:
        fresh = initialise(*arguments)
        given = {layer: {**sides, "a": mx.array(arrays[f"start.{layer}.a"])} for layer, sides in fresh.matrices.items()}
        return LoraWeights(fresh.config, given)

    monkeypatch.setattr(trainer_module, "initialise", start)
    monkeypatch.setattr(trainer_module, "Batches", lambda *_: Given(parts))
    asked = tiny.asking(**record["run"], steps=30, batch_size=len(parts[0]), spike=0)
    reports, weights = finish(Trainer(golden_model.decoder, asked, parts[0]))
    assert len(reports) == len(record["reports"]) == 30
    for report, wanted in zip(reports, record["reports"], strict=True):
        assert report.loss == pytest.approx(wanted["loss"], abs=1e-4), report.step
        assert report.learning_rate == pytest.approx(wanted["learning_rate"])
        assert report.gradient_norm == pytest.approx(wanted["gradient_norm"], rel=2e-3), report.step
    assert reports[-1].loss < 0.9 * reports[0].loss
    found = logits(golden_model, tiny.trainable(golden_model, weights), record["probe"])
    assert np.abs(found - arrays["logits"]).max() < 2e-4


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_peft_saved_gives_its_logits_here(golden_model: LoadedModel, tmp_path: Path, name: str) -> None:
    record, arrays = golden(name)
    weights = peft.read(GOLDENS / "peft" / name, golden_model.linear_shapes)
    pool = AdapterPool(golden_model, AdapterStore(tmp_path))
    pool.save("loaded", weights, {})
    found = logits(golden_model, pool.rows([pool.acquire("loaded")]), record["probe"])
    assert np.abs(found - arrays["logits"]).max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True}], ids=["LoRA", "DoRA", "rsLoRA"])
def test_an_adapter_that_we_saved_gives_our_logits_in_peft(
    golden_model: LoadedModel, tmp_path: Path, kind: dict[str, Any]
) -> None:
    if not PEERS.exists():
        pytest.skip("make peers")
    weights = tiny.adapter(golden_model, 4, 1, **kind)
    weights = LoraWeights(weights.config, {n: {**s, "b": s["b"] * 0.2} for n, s in weights.matrices.items()})
    AdapterStore(tmp_path).write("tiny-llama", "ours", weights, {})
    probe, out = [3, 1, 4, 15, 9, 26, 5], tmp_path / "logits.npy"
    command = [str(PEERS), str(GOLDENS / "peft_logits.py"), str(tmp_path / "tiny-llama/ours/1"), str(out)]
    subprocess.run([*command, *map(str, probe)], check=True, timeout=110, capture_output=True)
    found = logits(golden_model, tiny.trainable(golden_model, weights), probe)
    assert np.abs(found - np.load(out)).max() < 2e-4


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_in_mlx_lms_layout_is_read(model: LoadedModel, tmp_path: Path, dora: bool) -> None:
    wanted = tiny.adapter(model, 3, 1, dora=dora)
    write_mlx_lm(tmp_path, wanted)
    found = mlx_lm.read(tmp_path, model.linear_shapes)
    assert found.config == replace(wanted.config, targets=tuple(sorted(tiny.LAYERS)))
    for name, sides in wanted.matrices.items():
        for side, array in sides.items():
            assert np.array_equal(np.array(found.matrices[name][side]), np.array(array)), (name, side)


def write_mlx_lm(folder: Path, weights: LoraWeights) -> None:
    """As `mlx_lm.lora` writes them: its modules are called `model.layers…`, A lies (in, rank)."""
    tensors = {
        f"model.{name}.{'m' if side == 'm' else f'lora_{side}'}": array
        for name, sides in weights.matrices.items()
        for side, array in sides.items()
    }
    safetensors.write(folder / "adapters.safetensors", tensors)
    parameters = {"rank": weights.config.rank, "scale": weights.config.scale, "dropout": 0.0}
    config = {
        "fine_tune_type": "dora" if weights.config.dora else "lora",
        "num_layers": -1,
        "lora_parameters": parameters,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fine_tune_type": "full"}, 'fine_tune_type "full"; only lora and dora'),
        ({"fine_tune_type": "dora"}, "lacks lora_magnitude_vector"),
        ({"lora_parameters": None}, "no lora_parameters"),
        ({"lora_parameters": {"rank": 0, "scale": 2.0}}, "rank 0"),
        ({"lora_parameters": {"rank": 3, "scale": float("nan")}}, "scale NaN"),
        ({"lora_parameters": {"rank": 4, "scale": 2.0}}, "this model and rank need"),
        ({"lora_parameters": {"rank": 3, "scale": 2.0, "alpha": 16}}, "alpha"),
        (
            {"lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["self_attn.q_proj"]}},
            "that adapter_config.json leaves",
        ),
        ({"lora_parameters": {"rank": 3, "scale": 2.0, "keys": "q_proj"}}, 'keys "q_proj"; expected a list'),
        ({"num_layers": 1}, r"layers\.0\..* that adapter_config.json leaves out"),
        ({"num_layers": "all"}, 'num_layers "all"'),
        ({"lora_layers": 2}, "lora_layers"),
    ],
)
def test_a_wrong_folder_of_mlx_lm_is_refused(
    model: LoadedModel, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    write_mlx_lm(tmp_path, tiny.adapter(model, 3, 1))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ModelError, match=why):
        mlx_lm.read(tmp_path, model.linear_shapes)


@pytest.mark.parametrize("keys", ["none", "names", "whole"])
@pytest.mark.parametrize("name", ["gemma3", "nemotron_h", "exaone"])
def test_an_adapter_of_mlx_lm_for_layers_under_any_path_of_a_network_is_read(
    tmp_path: Path, name: str, keys: str
) -> None:
    """By the paths in the network, which `mlx_lm.lora` writes: of the last layer alone, or by a whole name."""
    linear = {path: each for path, each in bridged.network(name)[0].named_modules() if isinstance(each, nn.Linear)}
    part = ".0." if keys == "whole" else ".3."
    path = min(path for path in linear if part in path)
    out, wide = linear[path].weight.shape
    tensors = {f"{path}.lora_a": mx.ones((wide, 2)), f"{path}.lora_b": mx.ones((2, out))}
    safetensors.write(tmp_path / "adapters.safetensors", tensors)
    stated = {"none": {}, "names": {"keys": [path.split(part)[1]]}, "whole": {"keys": [path]}}[keys]
    fields = {"num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0, **stated}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    found = mlx_lm.read(tmp_path, bridged.bridged(name).linear_shapes)
    assert list(found.matrices) == [adapter_name(path)]


def test_a_layer_that_mlx_lms_file_has_under_two_paths_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    write_mlx_lm(tmp_path, tiny.adapter(model, 3, 1))
    path = tmp_path / "adapters.safetensors"
    tensors = safetensors.read(path)
    twice = {f"language_model.{name}": array for name, array in tensors.items()}
    mx.eval(tensors)
    safetensors.write(path, {**tensors, **twice})
    with pytest.raises(ModelError, match="is there twice, under another name too"):
        mlx_lm.read(tmp_path, model.linear_shapes)


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj.lora_a", "layers.0.self_attn.q_proj.lora_a"])
def test_a_tensor_of_mlx_lm_that_belongs_to_no_layer_is_refused_by_name(
    model: LoadedModel, tmp_path: Path, name: str
) -> None:
    write_mlx_lm(tmp_path, tiny.adapter(model, 3, 1))
    path = tmp_path / "adapters.safetensors"
    tensors = {**safetensors.read(path), name: mx.zeros((32, 3))}
    mx.eval(tensors)
    safetensors.write(path, tensors)
    with pytest.raises(ModelError, match=f"tensor {name} belongs to no layer of this model"):
        mlx_lm.read(tmp_path, model.linear_shapes)


def test_numbers_that_are_not_finite_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    weights = tiny.adapter(model, 3, 1)
    name = sorted(weights.matrices)[2]
    weights.matrices[name]["b"] = weights.matrices[name]["b"] * float("inf")
    AdapterStore(tmp_path).write("tiny", "bad", weights, {})
    with pytest.raises(ModelError, match=f"layer {name} holds numbers that are not finite"):
        AdapterStore(tmp_path).read("tiny", "bad", 1, model.linear_shapes)
