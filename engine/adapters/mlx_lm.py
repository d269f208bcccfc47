"""One adapter on disk in mlx-lm's layout: `adapter_config.json` and `adapters.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from engine.adapters import peft
from engine.adapters.lora import LoraConfig, LoraWeights
from engine.jsonfiles import read_object
from engine.weights import safetensors
from stoker.errors import ModelError

WEIGHTS_FILE = "adapters.safetensors"
#: mlx-lm's name for our layer `layers.0.self_attn.q_proj` is `model.` before it.
_TENSOR = re.compile(r"model\.(?P<layer>.+)\.(?:lora_(?P<side>[ab])|(?P<m>m))")


def read(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> LoraWeights:
    """The adapter in `folder`, checked as `peft.read` does. Its A and B lie as ours do; it keeps the scale itself, so
    alpha is scale · rank. Raises `ModelError` that names the file and what is wrong with it."""
    path = folder / peft.CONFIG_FILE
    fields = read_object(path)
    method = fields.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        raise ModelError(f"{path}: fine_tune_type {method!r}; only 'lora' and 'dora' can be read.")
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ModelError(f"{path}: no lora_parameters in it.")
    rank = peft.checked_rank(path, parameters.get("rank"))
    scale = peft.checked_number(path, "scale", parameters.get("scale"))
    matrices: peft.Numbers = {}
    for tensor, array in safetensors.read_numbers(folder / WEIGHTS_FILE).items():
        match = _TENSOR.fullmatch(tensor)
        if match is None or match["layer"] not in shapes:
            raise ModelError(f"{folder / WEIGHTS_FILE}: tensor {tensor} belongs to no layer of this model.")
        matrices.setdefault(match["layer"], {})["m" if match["m"] else match["side"]] = array
    # It may train the last layers alone, so which there should be is not known.
    config = LoraConfig(rank, scale * rank, (), dora=method == "dora")
    return peft.checked(folder / WEIGHTS_FILE, config, matrices, shapes, {})
