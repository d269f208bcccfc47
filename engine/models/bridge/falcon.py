"""What mlx-lm's file of Falcon-H1 leaves out: the multiplier of keys, the groups of a norm, and layers of codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.fields import Fields
from stoker.errors import ModelError

#: By this one the file sees whether tensors are in its layout, their multipliers within.
_CONV = "model.layers.0.mamba.conv1d.weight"


def correct(network: nn.Module, file: str, config: Mapping[str, Any]) -> None:
    """Put both into a network that was made; others stay as they are. Raises `ModelError` for a multiplier that is
    none."""
    if file != "falcon_h1":
        return
    multiplier = Fields(config, "config.json").number("key_multiplier", 1.0)
    for layer in network.layers:
        # Scores are products with keys, which rotation does not stretch.
        layer.self_attn.scale *= multiplier
        norm = layer.mamba.get("norm")
        if norm is not None and norm.n_groups > 1:
            layer.mamba.norm = GroupedNorm(norm)


def in_layout(network: Any, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors as the file has them, each with its multiplier: of a layer that is codes, its scales and biases have
    it, where the file would multiply the codes. Raises `ModelError` for scales that cannot be multiplied."""
    coded = [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]
    apart = {f"{stem}.{part}" for stem in coded for part in ("weight", "scales", "biases")}
    made: dict[str, mx.array] = network.sanitize({name: array for name, array in arrays.items() if name not in apart})
    if made.get(_CONV) is arrays.get(_CONV):
        return dict(arrays)
    made |= {f"{stem}.weight": arrays[f"{stem}.weight"] for stem in coded}
    for part in ("scales", "biases"):
        numbers = {f"{stem}.weight": arrays[f"{stem}.{part}"] for stem in coded if f"{stem}.{part}" in arrays}
        for name, array in numbers.items():
            if not mx.issubdtype(array.dtype, mx.floating):
                raise ModelError(f"the {part} of {name!r} are of {array.dtype}, not of floating-point numbers")
        multiplied = network.sanitize({**numbers, _CONV: arrays[_CONV]})
        made |= {f"{name.removesuffix('weight')}{part}": multiplied[name] for name in numbers}
    return made


class GroupedNorm(nn.Module):
    """Falcon-H1's gated RMSNorm over each group of numbers by itself."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.weight = whole.weight
        self.eps, self.groups, self.gate_last = whole.variance_epsilon, whole.n_groups, whole.norm_before_gate

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        opened = gate * mx.sigmoid(gate)
        y = x if self.gate_last else x * opened
        y = mx.fast.rms_norm(mx.unflatten(y, -1, (self.groups, -1)), None, self.eps).flatten(-2)
        made: mx.array = y * self.weight
        return made * opened if self.gate_last else made
