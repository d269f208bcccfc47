"""What mlx-lm's file of Falcon-H1 leaves out: the multiplier of keys, and the groups of a norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.fields import Fields


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
