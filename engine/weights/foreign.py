"""Checkpoints whose quantization is another's than MLX's, brought into its layout (`engine.weights.mlx_layout`).

AWQ and GPTQ become MLX's affine form (`engine.weights.packed_integers`). FP8, with a scale for each block of a matrix
(DeepSeek-V3; `X.weight_scale_inv`), becomes dense: w = scale · weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from engine.weights import foreign_sections
from engine.weights.foreign_sections import CONFIG_KEYS, Blocks
from engine.weights.mlx_layout import split
from engine.weights.packed_integers import PackedIntegers
from engine.weights.quantized import Form, QuantizedTensor
from engine.weights.safetensors_header import FP8
from stoker.errors import ModelError

_PACKED, _SCALE = ".qweight", ".weight_scale_inv"
#: What static FP8 rounds activations with: products here do not round them.
_ACTIVATIONS = (".activation_scale", ".input_scale")


def in_mlx_layout(
    config: Mapping[str, Any], arrays: dict[str, mx.array], dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """`arrays` and config.json of a folder, for products in `dtype`; those of MLX's own layout as they are.

    Raises `ModelError` for a section or a layer that cannot be read.
    """
    foreign = foreign_sections.read(config)
    if foreign is None:
        return arrays, dict(config)
    rest = _without_section(config)
    if isinstance(foreign, Blocks):
        return _from_fp8(foreign.block, arrays, dtype), rest
    found, forms = _from_packed(PackedIntegers(foreign), arrays, dtype)
    first = next(iter(forms.values()), None)
    if first is not None:
        rest["quantization"] = {**asdict(first), **{name: asdict(form) for name, form in forms.items()}}
    return found, rest


def _without_section(config: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(rest.get("text_config"), Mapping):
        rest["text_config"] = {key: value for key, value in rest["text_config"].items() if key not in CONFIG_KEYS}
    return rest


def _from_packed(
    packed: PackedIntegers, arrays: dict[str, mx.array], dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, Form]]:
    """The tensors, and the form of each layer that is quantized."""
    found: dict[str, mx.array] = {}
    forms: dict[str, Form] = {}
    for layer in [name.removesuffix(_PACKED) for name in arrays if name.endswith(_PACKED)]:
        qweight, scales = arrays.pop(layer + _PACKED), arrays.pop(f"{layer}.scales", None)
        if scales is None:
            raise ModelError(f"the quantized layer {layer!r} lacks its scales")
        qzeros, g_idx = (arrays.pop(f"{layer}.{part}", None) for part in ("qzeros", "g_idx"))
        try:
            read = packed.read(qweight, scales, qzeros, g_idx, dtype)
        except ModelError as error:
            raise ModelError(f"the quantized layer {layer!r}: {error}") from error
        found |= split(f"{layer}.weight", read)
        if isinstance(read, QuantizedTensor):
            forms[layer] = read.form
    return {**arrays, **found}, forms


def _from_fp8(block: tuple[int, int] | None, arrays: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    found = {name: array for name, array in arrays.items() if not name.endswith((_SCALE, *_ACTIVATIONS))}
    for name in [name for name in arrays if name.endswith(_SCALE)]:
        layer = name.removesuffix(_SCALE)
        weight = arrays.get(f"{layer}.weight")
        if weight is None or weight.dtype != mx.uint8:
            raise ModelError(f"the quantized layer {layer!r} has scales and no weight of {FP8}")
        try:
            found[f"{layer}.weight"] = _scaled(weight, arrays[name], block).astype(dtype)
        except ModelError as error:
            raise ModelError(f"the quantized layer {layer!r}: {error}") from error
    bare = next((name for name, array in found.items() if array.dtype == mx.uint8), None)
    if bare is not None:
        raise ModelError(f"tensor {bare!r} is of {FP8} and lacks its scales")
    return found


def _scaled(weight: mx.array, scale: mx.array, block: tuple[int, int] | None) -> mx.array:
    """float32 (…, out, in), each block with its scale; without blocks there is one for all."""
    if not mx.issubdtype(scale.dtype, mx.floating):
        raise ModelError(f"its scales are of {scale.dtype}, not of floating-point numbers")
    dense = mx.from_fp8(weight, mx.float32)
    if scale.size == 1:
        return dense * scale.astype(mx.float32).reshape(1)
    sides = weight.shape[-2:]
    wanted = () if block is None else tuple(-(-side // size) for side, size in zip(sides, block, strict=True))
    if block is None or scale.shape != (*weight.shape[:-2], *wanted):
        raise ModelError(f"blocks of {block}: a weight {weight.shape} and scales {scale.shape} do not fit together")
    scale = scale.astype(mx.float32)
    for axis, side, size in zip((-2, -1), sides, block, strict=True):
        scale = mx.take(scale, mx.arange(side) // size, axis=axis)
    return dense * scale
