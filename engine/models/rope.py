"""Rotary positions (Su et al., "RoFormer", 2021), the two halves of a head paired, and how they are stretched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from engine.models.fields import Fields
from stoker.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """Every position divided by `factor` (Chen et al., "Extending context window … via positional interpolation")."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: slow rotations divided by `factor`, fast ones kept, those between blended.

    Slow is a wavelength above original/low, fast one below original/high.
    """

    factor: float
    low: float
    high: float
    original: int


Scaling = Linear | Llama3 | None


def from_config(config: Mapping[str, Any], context: int) -> tuple[float, Scaling]:
    """(base, scaling) by Hugging Face's config.json, in the form before transformers 5 or in that since.

    `rope_scaling` beside `rope_parameters` wins, as in transformers. Raises `ModelError` for a type not supported.
    """
    bases: dict[str, Any] = dict(config)
    scaling: Scaling = None
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if not value:
            continue
        if not isinstance(value, Mapping):
            raise ModelError(f"config.json: {name} {str(value)[:100]} is not an object")
        bases |= value
        scaling = _scaling(name, value, context)
    return Fields(bases, "config.json").number("rope_theta", 10_000.0), scaling


def _scaling(name: str, value: Mapping[str, Any], context: int) -> Scaling:
    fields = Fields(value, f"config.json: {name}")
    fields.only("partial_rotary_factor", 1.0)
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(fields.number("factor"))
    if kind != "llama3":
        raise ModelError(f"config.json: {name} of type {kind!r} is not supported; default, linear and llama3 are")
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        raise ModelError(f"config.json: {name}: low_freq_factor {low} must be below high_freq_factor {high}")
    original = fields.count("original_max_position_embeddings", context)
    return Llama3(fields.number("factor"), low, high, original)


def from_gguf(metadata: Mapping[str, Any], architecture: str) -> tuple[float, Scaling]:
    """(base, scaling) by GGUF metadata; Llama 3's scaling comes as a tensor there. Raises `ModelError`."""
    fields = Fields(metadata, "GGUF metadata")
    base = fields.number(f"{architecture}.rope.freq_base", 10_000.0)
    factor = fields.number(f"{architecture}.rope.scale_linear", 1.0)
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        factor = fields.number(f"{architecture}.rope.scaling.factor")
    elif kind != "none":
        raise ModelError(
            f"GGUF metadata: {architecture}.rope.scaling.type = {kind!r} is not supported; none and linear are"
        )
    return base, None if factor == 1.0 else Linear(factor)


class Rope:
    """Turns pairs (x_i, x_{i+d/2}) of a head by position / period_i, period_i = base^(2i/d) as scaled.

    `factors` (d/2,) multiply the periods: GGUF's form of Llama 3's scaling.
    """

    def __init__(self, head_dim: int, base: float, scaling: Scaling = None, factors: mx.array | None = None):
        self._dim, self._base, self._scale = head_dim, base, 1.0
        self._periods: mx.array | None = None
        if isinstance(scaling, Linear):
            self._scale = 1.0 / scaling.factor
        if isinstance(scaling, Llama3) or factors is not None:
            self._periods = mx.array(_periods(head_dim, base, scaling), mx.float32)
        if factors is not None and self._periods is not None:
            self._periods = self._periods * factors
        plain = mx.array(_periods(head_dim, base, None), mx.float32)
        self._all_periods = (plain if self._periods is None else self._periods) / self._scale
        mx.eval([self._all_periods, *([] if self._periods is None else [self._periods])])

    @property
    def periods(self) -> mx.array:
        """(d/2,) float32: the pair i turns by position / periods[i]. For the kernel of one new token a row."""
        return self._all_periods

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """x (B, heads, T, d) at positions offset, offset + 1 …; `offset` is one for all rows or int32 (B,)."""
        base = None if self._periods is not None else self._base
        return mx.fast.rope(
            x, self._dim, traditional=False, base=base, scale=self._scale, offset=offset, freqs=self._periods
        )


def _periods(head_dim: int, base: float, scaling: Scaling) -> np.ndarray:
    periods = base ** (np.arange(0, head_dim, 2) / head_dim)
    if not isinstance(scaling, Llama3):
        return periods
    turns = scaling.original / (2 * math.pi * periods)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return periods / (kept + (1.0 - kept) / scaling.factor)
