"""Where mlx-lm's files make the scores of attention otherwise than transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from engine.models.fields import Fields


def correct(network: nn.Module, file: str, config: Mapping[str, Any]) -> None:
    """Put right the scores of a network that was made. Raises `ModelError` for a switch that is none."""
    if file == "gpt2":
        _scale_by_layer(network, Fields(config, "config.json"))
    if file == "llama4_text":
        _norm_what_turns(network)


def _scale_by_layer(network: nn.Module, fields: Fields) -> None:
    """GPT-2's models may divide their scores by the number of the layer (CodeParrot), or not by the root of a head's
    size; mlx-lm's file passes over both."""
    by_layer, by_size = fields.flag("scale_attn_by_inverse_layer_idx"), fields.flag("scale_attn_weights", default=True)
    for number, layer in enumerate(network.layers, 1):
        size = layer.attn.head_dim**-0.5 if by_size else 1.0
        layer.attn.scale = size / number if by_layer else size


def _norm_what_turns(network: nn.Module) -> None:
    """Llama 4 norms queries and keys in those layers alone that turn them; mlx-lm's file in all."""
    for layer in network.layers:
        layer.self_attn.use_qk_norm = layer.self_attn.use_qk_norm and bool(layer.self_attn.use_rope)
