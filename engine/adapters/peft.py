"""One adapter on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.adapters.lora import LoraConfig, LoraWeights, target_shapes
from engine.jsonfiles import read_object, write_json
from engine.weights import safetensors
from stoker.contract.requests import MAX_RANK
from stoker.errors import ModelError

#: Linear layer's dotted name → its matrices, as a file has them.
Numbers = dict[str, dict[str, np.ndarray]]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
#: PEFT's name for our layer `layers.0.self_attn.q_proj` is this before it.
_PREFIX = "base_model.model.model."
#: PEFT's fields that make something else of the sum, and what they are in LoRA and DoRA.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
}
#: PEFT's tensors → our sides. It wrote the magnitude with `.weight` behind it for a while.
_TENSOR = re.compile(
    re.escape(_PREFIX) + r"(?P<layer>.+)\.lora_(?:(?P<side>[AB])\.weight|(?P<m>magnitude_vector)(?:\.weight)?)"
)


def write(folder: Path, model: str, weights: LoraWeights) -> None:
    """Write both files into `folder`, each whole. Raises `OSError`."""
    tensors = {}
    for name, sides in weights.matrices.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = sides["a"].T
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = sides["b"].T
        if "m" in sides:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = sides["m"]
    safetensors.write(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": weights.config.rank,
        "lora_alpha": weights.config.alpha,
        "target_modules": sorted(weights.config.targets),
        "use_rslora": weights.config.rslora,
        "use_dora": weights.config.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG_FILE, config)


def read(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> LoraWeights:
    """The adapter in `folder`, checked against a model's layers, name → (in, out), and evaluated, in float32.

    Raises `ModelError` that names the file and what is wrong with it.
    """
    fields = read_object(folder / CONFIG_FILE)
    config = _config(folder / CONFIG_FILE, fields)
    whole = all(fields.get(name) is None for name in ("layers_to_transform", "exclude_modules"))
    return _weights(folder / WEIGHTS_FILE, config, shapes, whole=whole)


def checked_rank(path: Path, rank: object) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ModelError(f"{path}: rank {rank!r}; allowed: 1 to {MAX_RANK}.")
    return rank


def checked_number(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
        raise ModelError(f"{path}: {name} {value!r}; expected a number above 0.")
    return float(value)


def _config(path: Path, fields: Mapping[str, Any]) -> LoraConfig:
    for name, plain in _PLAIN.items():
        if fields.get(name) not in (None, plain):
            raise ModelError(f"{path}: {name} {fields[name]!r}; only LoRA and DoRA can be read, with {name} {plain!r}.")
    targets = fields.get("target_modules")
    # PEFT also takes a pattern, or `all-linear`: which layers it met is then for the tensors to say.
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        targets = []
    return LoraConfig(
        checked_rank(path, fields.get("r")),
        checked_number(path, "lora_alpha", fields.get("lora_alpha")),
        tuple(target.rpartition(".")[2] for target in targets),
        rslora=bool(fields.get("use_rslora")),
        dora=bool(fields.get("use_dora")),
    )


def _weights(path: Path, config: LoraConfig, shapes: Mapping[str, tuple[int, int]], *, whole: bool) -> LoraWeights:
    matrices: Numbers = {}
    for tensor, array in safetensors.read_numbers(path).items():
        match = _TENSOR.fullmatch(tensor)
        if match is None or match["layer"] not in shapes:
            raise ModelError(f"{path}: tensor {tensor} belongs to no layer of this model.")
        side = "m" if match["m"] else match["side"].lower()
        matrices.setdefault(match["layer"], {})[side] = array if side == "m" else array.T
    wanted = target_shapes(shapes, config.targets) if whole else {}
    return checked(path, config, matrices, shapes, wanted)


def checked(
    path: Path,
    config: LoraConfig,
    matrices: Numbers,
    shapes: Mapping[str, tuple[int, int]],
    wanted: Mapping[str, object],
) -> LoraWeights:
    """The adapter of these matrices, once each is of the shape and of the finite numbers that its layer and the rank
    need, no side is missing, and none of the layers `wanted`."""
    sides = {"a", "b", "m"} if config.dora else {"a", "b"}
    for name in wanted.keys() | matrices.keys():
        found = matrices.get(name, {})
        for side in sorted(sides ^ found.keys()):
            problem = "lacks" if side in sides else "must not have"
            raise ModelError(f"{path}: layer {name} {problem} {_SAID[side]}.")
        width_in, width_out = shapes[name]
        expected = {"a": (width_in, config.rank), "b": (config.rank, width_out), "m": (width_out,)}
        for side, array in found.items():
            if array.shape != expected[side]:
                raise ModelError(
                    f"{path}: {_SAID[side]} of layer {name} is {array.shape}; "
                    f"this model and rank need {expected[side]}."
                )
    if not matrices:
        raise ModelError(f"{path}: no adapter in it.")
    for name in sorted(matrices):
        if not all(np.isfinite(array).all() for array in matrices[name].values()):
            raise ModelError(f"{path}: layer {name} holds numbers that are not finite.")
    targets = config.targets or tuple(sorted({name.rpartition(".")[2] for name in matrices}))
    arrays = {name: {side: mx.array(array) for side, array in sides.items()} for name, sides in matrices.items()}
    return LoraWeights(replace(config, targets=targets), arrays)


_SAID = {"a": "lora_A", "b": "lora_B", "m": "lora_magnitude_vector"}
