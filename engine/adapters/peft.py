"""One adapter on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.adapters.flat import Flat, laid_out
from engine.adapters.lora import LoraConfig, LoraWeights, target_shapes
from engine.adapters.peft_names import named, peft_name, turned
from engine.adapters.targets import target_layers
from engine.models.allowed import ANYTHING, Table
from engine.models.fields import Fields
from engine.platform.jsonfiles import read_object, write_json
from engine.weights import safetensors
from stoker.contract.requests import MAX_RANK
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: Linear layer's dotted name → its matrices, as a file has them.
Numbers = dict[str, dict[str, np.ndarray]]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
#: What a file has before PEFT's name of each layer.
_PREFIX = "base_model.model."
#: What PEFT's fields say: some are read, some change nothing once an adapter is trained, and of those that make
#: something else of the sum, the values with which it is LoRA or DoRA.
_TABLE = Table(
    (
        "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_rslora",
        "use_dora", "init_lora_weights",
    ),
    {
        **dict.fromkeys(
            (
                "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
                "lora_dropout", "qalora_group_size", "megatron_core", "ensure_weight_tying", "loftq_config",
                "eva_config", "corda_config", "lora_ga_config",
            ),
            ANYTHING,
        ),
        "peft_type": ("LORA",),
        # PEFT goes by the layer itself.
        "fan_in_fan_out": (False, True),
        "bias": ("none",),
        "lora_bias": (False,),
        "rank_pattern": ({},),
        "alpha_pattern": ({},),
        "modules_to_save": ([],),
        "trainable_token_indices": ([], {}),
        "target_parameters": ([],),
        "use_qalora": (False,),
        "merge_weights": (False,),
        **dict.fromkeys(
            (
                "alora_invocation_tokens", "layer_replication", "use_bdlora", "velora_config", "kasa_config",
                "arrow_config", "monteclora_config", "megatron_config", "enable_lora",
            ),
            (),
        ),
    },
)  # fmt: skip
#: Ways to begin that leave the base as it is.
_BEGINNINGS = ("gaussian", "eva", "orthogonal")
#: PEFT's tensors → our sides. It wrote the magnitude with `.weight` behind it for a while.
_TENSOR = re.compile(
    re.escape(_PREFIX) + r"(?P<layer>.+)\.lora_(?:(?P<side>[AB])\.weight|(?P<m>magnitude_vector)(?:\.weight)?)"
)


def write(folder: Path, model: str, weights: LoraWeights) -> None:
    """Write both files into `folder`, each whole. Raises `OSError`."""
    tensors = {}
    for layer, sides in weights.matrices.items():
        name = _PREFIX + peft_name(layer)
        tensors[f"{name}.lora_A.weight"] = sides["a"].T
        tensors[f"{name}.lora_B.weight"] = sides["b"].T
        if "m" in sides:
            tensors[f"{name}.lora_magnitude_vector"] = sides["m"]
    safetensors.write(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": weights.config.rank,
        "lora_alpha": weights.config.alpha,
        "target_modules": sorted(
            peft_name(target) if target in weights.matrices else target for target in weights.config.targets
        ),
        "use_rslora": weights.config.rslora,
        "use_dora": weights.config.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(map(turned, weights.matrices)),
        "inference_mode": True,
    }
    write_json(folder / CONFIG_FILE, config)


def read(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> LoraWeights:
    """The adapter in `folder`, checked against a model's layers, name → (in, out), in float32.

    Raises `ModelError` that names the file and what is wrong with it.
    """
    path = folder / CONFIG_FILE
    fields = read_object(path)
    config = _config(path, fields)
    tensors = safetensors.read_numbers(folder / WEIGHTS_FILE)
    layers = named(shapes, [match["layer"] for match in map(_TENSOR.fullmatch, tensors) if match])
    wanted = target_layers(str(path), fields, layers)
    matrices = _matrices(folder / WEIGHTS_FILE, tensors, layers, wanted)
    return checked(folder / WEIGHTS_FILE, config, matrices, shapes, wanted)


def checked_rank(path: Path, rank: object) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ModelError(f"{path}: rank {as_json(rank)}; allowed: 1 to {MAX_RANK}.")
    return rank


def checked_number(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
        raise ModelError(f"{path}: {name} {as_json(value)}; expected a number above 0.")
    return float(value)


def _config(path: Path, fields: Mapping[str, Any]) -> LoraConfig:
    if "peft_type" not in fields:
        raise ModelError(f'{path}: no peft_type in it; "LORA" can be read.')
    _TABLE.check(fields, str(path))
    _check_beginning(path, fields.get("init_lora_weights", True))
    said = Fields(fields, str(path))
    return LoraConfig(
        checked_rank(path, fields.get("r")),
        checked_number(path, "lora_alpha", fields.get("lora_alpha")),
        (),
        rslora=said.flag("use_rslora"),
        dora=said.flag("use_dora"),
    )


def _check_beginning(path: Path, value: object) -> None:
    """Refuse adapters that are the difference to another base: PEFT changes its weights when it loads one."""
    known = value.lower() if isinstance(value, str) else value
    if known is None or isinstance(known, bool) or known in _BEGINNINGS:
        return
    raise ModelError(
        f"{path}: init_lora_weights {as_json(value)} is not supported: with it PEFT changes the base's own weights "
        "too. Save the adapter as plain LoRA, with PEFT: save_pretrained(FOLDER, "
        "path_initial_model_for_weight_conversion=FOLDER of the adapter as it began)"
    )


def _matrices(
    path: Path, tensors: Mapping[str, np.ndarray], layers: Mapping[str, str], wanted: Collection[str]
) -> Numbers:
    """`layers`: PEFT's name → ours."""
    matrices: Numbers = {}
    for tensor, array in tensors.items():
        match = _TENSOR.fullmatch(tensor)
        layer = None if match is None else layers.get(match["layer"])
        if match is None or layer is None:
            raise ModelError(f"{path}: tensor {tensor} belongs to no layer of this model.")
        if layer not in wanted:
            raise ModelError(f"{path}: tensor {tensor} belongs to a layer that {CONFIG_FILE} leaves out.")
        side = "m" if match["m"] else match["side"].lower()
        if side in matrices.setdefault(layer, {}):
            raise ModelError(f"{path}: tensor {tensor} is there under two names.")
        matrices[layer][side] = array if side == "m" else array.T
    return matrices


def checked(
    path: Path,
    config: LoraConfig,
    matrices: Numbers,
    shapes: Mapping[str, tuple[int, int]],
    wanted: Collection[str],
) -> LoraWeights:
    """The adapter of these matrices, once each is of the shape and of the finite numbers that its layer and the rank
    need, no side is missing, and none of the layers `wanted`."""
    sides = {"a", "b", "m"} if config.dora else {"a", "b"}
    for name in sorted({*wanted, *matrices}):
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
    # At once: of hundreds of small arrays, one after the other, a request for a new adapter would wait for most.
    numbers, places = laid_out(matrices)
    if not np.isfinite(numbers).all():
        name = next(name for name, sides in matrices.items() if not all(np.isfinite(a).all() for a in sides.values()))
        raise ModelError(f"{path}: layer {name} holds numbers that are not finite.")
    return LoraWeights(replace(config, targets=_targets(matrices, shapes)), Flat(mx.array(numbers), places))


def _targets(matrices: Numbers, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """The last names of the layers; their whole names if there are others of the same last names."""
    last = tuple(sorted({name.rpartition(".")[2] for name in matrices}))
    return last if target_shapes(shapes, last).keys() == matrices.keys() else tuple(sorted(matrices))


_SAID = {"a": "lora_A", "b": "lora_B", "m": "lora_magnitude_vector"}
