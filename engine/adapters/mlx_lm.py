"""One adapter on disk in mlx-lm's layout: `adapter_config.json` and `adapters.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from engine.adapters import peft
from engine.adapters.lora import LoraConfig, LoraWeights
from engine.models.allowed import ANYTHING, Table
from engine.models.bridge.linears import adapter_name
from engine.platform.jsonfiles import read_object
from engine.weights import safetensors
from stoker.contract.shown import as_json
from stoker.errors import ModelError

WEIGHTS_FILE = "adapters.safetensors"
_TENSOR = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<side>[ab])|(?P<m>m))")
_NUMBERED = re.compile(r".*?\.(\d+)\.(.+)")
#: How a layer's path begins in networks that have no body of another name around it.
_BODIES = ("backbone.", "transformer.")
#: The fields of adapter_config.json; all except these are of its training.
_TABLE = Table(
    ("fine_tune_type", "lora_parameters", "num_layers"),
    dict.fromkeys(
        (
            "model", "train", "test", "data", "seed", "optimizer", "optimizer_config", "batch_size", "iters",
            "val_batches", "test_batches", "learning_rate", "lr_schedule", "steps_per_report", "steps_per_eval",
            "save_every", "adapter_path", "resume_adapter_file", "max_seq_length", "config", "grad_checkpoint",
            "grad_accumulation_steps", "mask_prompt", "report_to", "project_name", "wandb", "clear_cache_threshold",
            "hf_dataset", "prompt_feature", "completion_feature",
        ),
        ANYTHING,
    ),
    # Its number of layers is that of those with an adapter; -1: all.
    kinds={},
)  # fmt: skip
_PARAMETERS = Table(("rank", "scale", "keys"), {"dropout": ANYTHING})


def read(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> LoraWeights:
    """The adapter in `folder`, checked as `peft.read` does. Its A and B lie as ours do; it keeps the scale itself, so
    alpha is scale · rank. Raises `ModelError` that names the file and what is wrong with it."""
    path = folder / peft.CONFIG_FILE
    fields = read_object(path)
    _TABLE.check(fields, str(path))
    method = fields.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        raise ModelError(f"{path}: fine_tune_type {as_json(method)}; only lora and dora can be read.")
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ModelError(f"{path}: no lora_parameters in it.")
    _PARAMETERS.check(parameters, f"{path}: lora_parameters")
    changed = _changed(path, fields.get("num_layers"), parameters.get("keys"), shapes)
    rank = peft.checked_rank(path, parameters.get("rank"))
    scale = peft.checked_number(path, "scale", parameters.get("scale"))
    matrices: peft.Numbers = {}
    for tensor, array in safetensors.read_numbers(folder / WEIGHTS_FILE).items():
        match = _TENSOR.fullmatch(tensor)
        layer = "" if match is None else _layer(match["layer"])
        if match is None or layer not in shapes:
            raise ModelError(f"{folder / WEIGHTS_FILE}: tensor {tensor} belongs to no layer of this model.")
        if layer not in changed:
            raise ModelError(
                f"{folder / WEIGHTS_FILE}: tensor {tensor} belongs to a layer that {path.name} leaves out."
            )
        sides, side = matrices.setdefault(layer, {}), "m" if match["m"] else match["side"]
        if side in sides:
            raise ModelError(f"{folder / WEIGHTS_FILE}: tensor {tensor} is there twice, under another name too.")
        sides[side] = array
    config = LoraConfig(rank, scale * rank, (), dora=method == "dora")
    return peft.checked(folder / WEIGHTS_FILE, config, matrices, shapes, ())


def _layer(path: str) -> str:
    """Our name of the layer that mlx-lm calls by its path in the network; empty for a path that begins as none does."""
    name = adapter_name(path)
    return name if name != path or path.startswith(_BODIES) else ""


def _numbered(name: str) -> tuple[int, str] | None:
    """(number of the layer, name within it) of what lies in a numbered layer; None for what is itself numbered."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def _changed(path: Path, count: object, keys: object, layers: Collection[str]) -> set[str]:
    """The layers that mlx-lm changes: the last `count` ones, or all for none, and in them those of `keys`."""
    if count is not None and type(count) is not int:
        raise ModelError(f"{path}: num_layers {as_json(count)}; expected a number.")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise ModelError(f"{path}: keys {as_json(keys)}; expected a list of names.")
    numbered = {name: found for name in layers if (found := _numbered(name)) is not None}
    first = 0
    if isinstance(count, int) and count > 0:
        first = max((number for number, _ in numbered.values()), default=0) + 1 - count
    whole = {_layer(key) for key in keys or ()}
    return {
        name
        for name in layers
        if name in whole
        or (name in numbered and numbered[name][0] >= first and (keys is None or numbered[name][1] in keys))
    }
