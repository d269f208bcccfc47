"""Configs of adapters: which layers they change, as PEFT has it (`goldens/peft_targets.py`), and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters import peft, targets
from engine.adapters.lora import LoraWeights, target_shapes
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.adapters.targets import target_layers
from engine.checkpoints.loading import LoadedModel
from engine.weights import safetensors
from stoker.errors import ModelError
from tests.engine import tiny

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "goldens/peft_targets.json").read_text())
LAYERS = [
    f"layers.{number}.{part}"
    for number in range(GOLDEN["layers"])
    for part in (
        *(f"self_attn.{each}_proj" for each in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
#: PEFT's names of them.
KEYS = {f"model.{layer}": layer for layer in LAYERS}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: json.dumps(case["fields"]))
def test_an_adapter_changes_the_layers_that_peft_changes(case: dict[str, Any]) -> None:
    try:
        found = sorted(target_layers("it", case["fields"], KEYS))
    except ModelError:
        assert not case["layers"]
    else:
        assert found == case["layers"]


@pytest.mark.parametrize(
    ("fields", "cause"),
    [({"target_modules": "(q"}, 'target_modules ".*" is no regular expression'),
     ({"target_modules": ["q_proj", 3]}, "target_modules .* neither a pattern nor a list"),
     ({"target_modules": {"q_proj": 1}}, "target_modules .* neither a pattern nor a list"),
     ({"target_modules": "q", "layers_to_transform": [0]}, "layers_to_transform goes with a list"),
     ({"target_modules": ["q"], "layers_to_transform": ["0"]}, "layers_to_transform .* neither a number"),
     ({"target_modules": ["q"], "layers_to_transform": True}, "layers_to_transform .* neither a number"),
     ({"target_modules": ["q"], "layers_pattern": "layers"}, "layers_pattern goes with"),
     ({"exclude_modules": 3}, "exclude_modules 3 is neither")],
)  # fmt: skip
def test_targets_that_peft_does_not_take_are_refused_by_name(fields: dict[str, Any], cause: str) -> None:
    with pytest.raises(ModelError, match=cause):
        target_layers("it", fields, KEYS)


def test_a_pattern_that_takes_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "SECONDS", 0.2)
    with pytest.raises(ModelError, match="takes too long to match"):
        target_layers("it", {"target_modules": r"(.*)*(.*)*(.*)*(.*)*x"}, KEYS)
    assert len(target_layers("it", {"target_modules": r".*\.q_proj"}, KEYS)) == GOLDEN["layers"]


def written(folder: Path, weights: LoraWeights, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    peft.write(folder, "tiny", weights)
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def part_of(weights: LoraWeights, *names: str) -> LoraWeights:
    return LoraWeights(weights.config, {name: weights.matrices[name] for name in names})


SOME = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")


@pytest.mark.parametrize(
    "said",
    [["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"], ["0.self_attn.q_proj", "1.mlp.down_proj"],
     r"model\.layers\.(0\.self_attn\.q|1\.mlp\.down)_proj"],
)  # fmt: skip
def test_an_adapter_of_single_layers_is_kept_and_read_again(model: LoadedModel, tmp_path: Path, said: object) -> None:
    weights = part_of(tiny.adapter(model, 3, 0), *SOME)
    found = peft.read(written(tmp_path / "theirs", weights, target_modules=said), model.linear_shapes)
    assert target_shapes(model.linear_shapes, found.config.targets).keys() == set(SOME)
    pool = AdapterPool(model, AdapterStore(tmp_path))
    pool.save("some", found, {})
    tokens = mx.array([[3, 1, 4, 1, 5]])
    served = model.decoder(tokens, adapters=pool.rows([pool.acquire("some")]))
    wanted = model.decoder(tokens, adapters=tiny.trainable(model, weights))
    assert np.abs(np.array(served) - np.array(wanted)).max() < 1e-4


@pytest.mark.parametrize("said", ["all-linear", r".*_proj", ["q_proj", "k_proj"], None])
def test_what_the_targets_name_and_the_file_lacks_is_refused_and_what_they_leave_out_too(
    model: LoadedModel, tmp_path: Path, said: object
) -> None:
    weights = part_of(tiny.adapter(model, 3, 0), "layers.0.self_attn.q_proj")
    with pytest.raises(ModelError, match="lacks lora_A"):
        peft.read(written(tmp_path, weights, target_modules=said), model.linear_shapes)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj.* belongs to a layer that .* leaves out"):
        peft.read(written(tmp_path, weights, target_modules=said, exclude_modules=["q_proj"]), model.linear_shapes)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [({"init_lora_weights": kind}, f'init_lora_weights "{kind}".*changes the base')
     for kind in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "mica", "another")]
    + [({"use_dora": "yes"}, "use_dora"), ({"use_rslora": 1}, "use_rslora"),
       ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
       ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
       ({"bias": "all"}, "bias"), ({"kasa_config": {}}, "kasa_config"),
       ({"arrow_config": {"top_k": 1}}, "arrow_config"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
       ({"alora_invocation_tokens": []}, "alora_invocation_tokens"), ({"velora_config": {}}, "velora_config"),
       ({"enable_lora": [True]}, "enable_lora"), ({"something_new": 1}, "something_new"),
       ({"peft_type": None}, "no peft_type")],
)  # fmt: skip
def test_fields_of_peft_that_make_something_else_of_it_are_refused_by_name(
    model: LoadedModel, tmp_path: Path, fields: dict[str, Any], cause: str
) -> None:
    folder = written(tmp_path, tiny.adapter(model, 3, 0), **fields)
    if fields == {"peft_type": None}:
        path = folder / peft.CONFIG_FILE
        path.write_text(path.read_text().replace('"peft_type": null, ', ""))
    with pytest.raises(ModelError, match=cause) as caught:
        peft.read(folder, model.linear_shapes)
    assert str(folder / peft.CONFIG_FILE) in str(caught.value)


def test_fields_of_peft_that_change_nothing_are_no_matter(model: LoadedModel, tmp_path: Path) -> None:
    weights = tiny.adapter(model, 3, 0)
    for beginning in (True, False, "gaussian", "eva", "orthogonal", None):
        said: dict[str, Any] = {"init_lora_weights": beginning, "lora_dropout": 0.1, "loftq_config": {},
                "megatron_core": "megatron.core", "task_type": "CAUSAL_LM", "peft_version": "0.21.2",
                "modules_to_save": [], "qalora_group_size": 16,
                "ensure_weight_tying": False, "eva_config": {"rho": 2.0}, "merge_weights": False,
                "fan_in_fan_out": True}  # fmt: skip
        assert len(peft.read(written(tmp_path, weights, **said), model.linear_shapes).matrices) == len(weights.matrices)


def test_a_magnitude_under_both_of_its_names_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    folder = written(tmp_path, tiny.adapter(model, 3, 0, dora=True))
    tensors = safetensors.read(folder / peft.WEIGHTS_FILE)
    mx.eval(tensors)
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    safetensors.write(folder / peft.WEIGHTS_FILE, {**tensors, f"{name}.weight": tensors[name] * 2})
    with pytest.raises(ModelError, match="under two names"):
        peft.read(folder, model.linear_shapes)
