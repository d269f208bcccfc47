"""Quantized checkpoints in the layout that mlx-lm writes and reads (mlx-community's).

config.json has `"quantization": {"group_size": 64, "bits": 4}`, with the dotted name of a layer as a further key where
that layer differs; the codes `X.weight` have `X.scales` and, in the affine mode, `X.biases` with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from engine.weights.foreign_sections import CONFIG_KEYS
from engine.weights.quantized import AFFINE, Form, QuantizedTensor
from engine.weights.tensors import Stored
from stoker.contract.shown import as_json
from stoker.errors import ModelError


@dataclass(frozen=True)
class QuantizedLayout:
    """The section of config.json: the form of all quantized layers, and of those that differ."""

    form: Form
    layers: Mapping[str, Form] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizedLayout | None:
        """None for a dense checkpoint. Raises `ModelError` for a quantization that is not MLX's."""
        section, other = (config.get(key) for key in CONFIG_KEYS)
        if section is None and other is None:
            return None
        if not isinstance(section, Mapping) or other not in (None, section):
            raise ModelError(
                f"config.json: quantization_config {str(other)[:100]} is not supported: MLX's own, awq, gptq and fp8 "
                "are. Take the model's unquantized checkpoint, and quantize it with `stoker models quantize`"
            )
        form = _form(section, "quantization")
        layers = {
            name: _form(value, f"quantization: {name}") for name, value in section.items() if isinstance(value, Mapping)
        }
        return cls(form, layers)

    def to_config(self) -> dict[str, Any]:
        """The sections for a config.json."""
        section: dict[str, Any] = asdict(self.form)
        for name, form in self.layers.items():
            section[name] = asdict(form)
        return {key: dict(section) for key in CONFIG_KEYS}

    def join(self, arrays: Mapping[str, mx.array]) -> tuple[dict[str, mx.array], dict[str, QuantizedTensor]]:
        """`arrays` of a checkpoint as (the dense ones, the quantized ones by the name of their codes).

        A layer is quantized if it has scales. Raises `ModelError` naming a layer whose arrays do not fit.
        """
        dense, quantized = dict(arrays), {}
        for scales in [name for name in arrays if name.endswith(".scales")]:
            layer = scales.removesuffix(".scales")
            form = self.layers.get(layer, self.form)
            weight, biases = dense.pop(f"{layer}.weight", None), dense.pop(f"{layer}.biases", None)
            if weight is None or (biases is None and form.mode == AFFINE):
                raise ModelError(f"the quantized layer {layer!r} lacks its weight or its biases")
            try:
                quantized[f"{layer}.weight"] = QuantizedTensor(weight, dense.pop(scales), biases, form)
            except ModelError as error:
                raise ModelError(f"the quantized layer {layer!r}: {error}") from error
        return dense, quantized


def _form(section: Mapping[str, Any], where: str) -> Form:
    mode = section.get("mode", AFFINE)
    group_size, bits = section.get("group_size"), section.get("bits")
    if not isinstance(group_size, int) or not isinstance(bits, int):
        raise ModelError(
            f"config.json: {where}: group_size {as_json(group_size)} and bits {as_json(bits)} must be integers"
        )
    try:
        return Form(group_size, bits, mode)
    except ModelError as error:
        raise ModelError(f"config.json: {where}: {error}") from error


def split(name: str, stored: Stored) -> dict[str, mx.array]:
    """A tensor under the names that it has in this layout."""
    if isinstance(stored, mx.array):
        return {name: stored}
    layer = name.removesuffix(".weight")
    return dict(zip((name, f"{layer}.scales", f"{layer}.biases"), stored.arrays, strict=False))
