"""Where the activation of mlx-lm's file is another form of GELU than config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_approx")


def correct(network: nn.Module, file: str, config: Mapping[str, Any]) -> None:
    """StarCoder2's models name the tanh approximation; mlx-lm's file computes the exact form."""
    if file != "starcoder2" or config.get("hidden_act", _TANH[0]) not in _TANH:
        return
    for layer in network.layers:
        layer.mlp = TanhMlp(layer.mlp)


class TanhMlp(nn.Module):
    """StarCoder2's feed-forward part with GELU as tanh approximates it."""

    def __init__(self, exact: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj = exact.c_fc, exact.c_proj

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.c_proj(nn.gelu_approx(self.c_fc(x)))
        return result
