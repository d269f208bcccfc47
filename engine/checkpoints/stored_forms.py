"""In which forms the weights of a folder are stored, by its headers. No MLX."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from engine.weights.foreign_sections import Blocks, Packing
from engine.weights.safetensors_header import FP8
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: dtypes of safetensors that hold weights; the others are codes, positions or masks.
FLOATS = ("F32", "F16", "BF16")


def stored_forms(
    entries: Mapping[str, Any], section: Mapping[str, Any], foreign: Packing | Blocks | None
) -> tuple[dict[str, int], int]:
    """(weights by form, bytes of all tensors). Of quantized layers the codes count, not the scales and biases."""
    dtypes: Counter[str] = Counter()
    size = 0
    for name, entry in entries.items():
        count = math.prod(entry["shape"])
        size += entry["data_offsets"][1] - entry["data_offsets"][0]
        layer, _, part = name.rpartition(".")
        if f"{layer}.scales" in entries and part in ("scales", "biases"):
            continue
        if isinstance(foreign, Packing) and part == "qweight":
            dtypes[f"{foreign.bits} bit"] += count * 32 // foreign.bits
        if isinstance(foreign, Blocks) and part.endswith("_scale_inv"):
            continue
        if f"{layer}.scales" in entries and part == "weight" and entry["dtype"] == "U32":
            bits = _bits(section, layer)
            dtypes[f"{bits} bit"] += count * 32 // bits
        elif entry["dtype"] in (*FLOATS, FP8):
            dtypes[entry["dtype"]] += count
    return dict(dtypes), size


def _bits(section: Mapping[str, Any], layer: str) -> int:
    own = section.get(layer)
    bits = own.get("bits") if isinstance(own, Mapping) else section.get("bits")
    if not isinstance(bits, int) or not 0 < bits <= 8:
        raise ModelError(f"config.json: quantization: bits {as_json(bits)} of {layer} is not a number from 1 to 8")
    return bits


def mlx_form(section: object) -> str:
    """A section of MLX's own, in words. Raises `ModelError` for what is none."""
    if not isinstance(section, Mapping):
        raise ModelError(f"config.json: quantization {as_json(section)} is not an object")
    return f"{section.get('bits')} bit in groups of {section.get('group_size')} (MLX)"
