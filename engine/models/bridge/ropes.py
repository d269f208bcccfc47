"""Where mlx-lm's rotary positions differ from transformers': put right in a network that was made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from engine.models.bridge.configs import text_config
from engine.models.fields import Fields


def correct(network: nn.Module, config: Mapping[str, Any]) -> None:
    """Dynamic NTK stretches what lies beyond the context, where no request goes: plain positions within it. YaRN's
    `truncate` and `attention_factor`, which mlx-lm passes over, count. Raises `ModelError` for values that are none."""
    plain: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if type(module).__name__ == "DynamicNTKScalingRoPE" and hasattr(module, "factor"):
            plain[path] = nn.RoPE(module.dims, traditional=module.traditional, base=module.base)
    if plain:
        network.update_modules(tree_unflatten(list(plain.items())))
    for where, stated in _yarns(text_config(config)):
        fields = Fields(stated, where)
        for module in network.modules():
            if type(module).__name__ != "YarnRoPE":
                continue
            if not fields.flag("truncate", default=True):
                module._freqs = _untruncated(module, fields, text_config(config))  # noqa: SLF001
            if stated.get("attention_factor") is not None:
                module.mscale = fields.number("attention_factor")


def _yarns(text: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in ("rope_scaling", "rope_parameters"):
        value = text.get(name)
        if isinstance(value, Mapping) and value.get("rope_type", value.get("type")) == "yarn":
            yield f"config.json: {name}", value


def _untruncated(module: nn.Module, fields: Fields, text: Mapping[str, Any]) -> mx.array:
    """The periods of YaRN whose borders between fast and slow pairs are not rounded to whole pairs (gpt-oss)."""
    dims, original = int(module.dims), fields.count("original_max_position_embeddings", 4096)
    base = fields.number("rope_theta", Fields(text, "config.json").number("rope_theta", 10_000.0))
    factor = fields.number("factor")

    def pair(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(pair(fields.number("beta_fast", 32.0)), 0.0), min(pair(fields.number("beta_slow", 1.0)), dims - 1)
    slow = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    period = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return 1.0 / ((1.0 - slow) / period + slow / (factor * period))
