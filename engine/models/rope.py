"""Rotary positions (Su et al., "RoFormer", 2021), the two halves of a head paired, and how they are stretched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from engine.models.allowed import Table
from engine.models.fields import Fields
from engine.platform.compiler import on_cpu
from stoker.contract.shown import as_json
from stoker.errors import ModelError


@dataclass(frozen=True)
class LinearScaling:
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


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): as Llama3's, the blend linear in the pair's index between `low` and
    `high`, and queries and keys multiplied by `gain`."""

    factor: float
    low: float
    high: float
    gain: float


Scaling = LinearScaling | Llama3 | Yarn | None

#: What each type of rope may say, beyond its type and base.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate",
)  # fmt: skip
_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": _LLAMA3, "yarn": _YARN,
}  # fmt: skip


def from_config(config: Mapping[str, Any], context: int, head_dim: int) -> tuple[float, Scaling]:
    """(base, scaling) by Hugging Face's config.json, in the form before transformers 5 or in that since.

    Where both are given, `rope_scaling` replaces `rope_parameters` completely, as in transformers.
    Raises `ModelError` for what is not supported.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    value = Fields(config, "config.json").mapping(name)
    where = f"config.json: {name}"
    if any(isinstance(each, Mapping) for each in value.values()):
        raise ModelError(f"{where}: by layer type ({', '.join(value)}) is not supported; only one for all layers is")
    if "rope_theta" in value and value["rope_theta"] is not None:
        base = Fields(value, where).number("rope_theta")
    else:
        base = Fields(config, "config.json").number("rope_theta", 10_000.0)
    # Phi keeps it at the top level; transformers looks there first.
    if config.get("original_max_position_embeddings") is not None and "original_max_position_embeddings" in _TYPES.get(
        _type(value, where), ()
    ):
        value = {**value, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    return base, _scaling(where, value, context, base, head_dim)


def _type(value: Mapping[str, Any], where: str) -> str:
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str) or kind not in _TYPES:
        named = "rope_type" if "rope_type" in value else "type"
        raise ModelError(f"{where}: {named} = {as_json(kind)} is not supported; {', '.join(_TYPES)} are")
    return kind


def _scaling(where: str, value: Mapping[str, Any], context: int, base: float, head_dim: int) -> Scaling:
    kind = _type(value, where)
    Table(("rope_type", "rope_theta", *_TYPES[kind]), {"type": (kind,), "partial_rotary_factor": (1.0,)}).check(
        value, where
    )
    fields = Fields(value, where)
    # Dynamic NTK stretches what lies beyond the context, and no request goes there.
    if kind == "dynamic":
        fields.number("factor")
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return LinearScaling(fields.number("factor"))
    original = fields.count("original_max_position_embeddings", context)
    if kind == "yarn":
        return _yarn(fields, value, original, context, base, head_dim)
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        raise ModelError(f"{where}: low_freq_factor {low} must be below high_freq_factor {high}")
    return Llama3(fields.number("factor"), low, high, original)


def _yarn(fields: Fields, value: Mapping[str, Any], original: int, context: int, base: float, head_dim: int) -> Yarn:
    factor = fields.number("factor", context / original)
    if base <= 1.0:
        raise ModelError(f"config.json: rope_theta {base} is too small for rope of type yarn; it must be above 1")

    def turns_at(turns: float) -> float:
        """The pair, counted in halves, that turns so often within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_at(fields.number("beta_fast", 32.0)), turns_at(fields.number("beta_slow", 1.0))
    if fields.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return Yarn(factor, low, high if high != low else high + 0.001, yarn_gain(fields, value, factor))


def yarn_gain(fields: Fields, value: Mapping[str, Any], factor: float) -> float:
    """What YaRN multiplies queries and keys by, as in transformers: `mscale` counts together with `mscale_all_dim`
    alone. `fields` are those of `value`. Raises `ModelError`."""

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

    if value.get("attention_factor") is not None:
        return fields.number("attention_factor")
    if value.get("mscale") and value.get("mscale_all_dim"):
        return grown(fields.number("mscale")) / grown(fields.number("mscale_all_dim"))
    return grown(1.0)


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
    return base, None if factor == 1.0 else LinearScaling(factor)


class Rope:
    """Turns pairs (x_i, x_{i+d/2}) of a head by position / period_i, period_i = base^(2i/d) as scaled.

    `factors` (d/2,) multiply the periods: GGUF's form of Llama 3's scaling.
    """

    def __init__(self, head_dim: int, base: float, scaling: Scaling = None, factors: mx.array | None = None):
        self._dim, self._base, self._scale = head_dim, base, 1.0
        self._periods: mx.array | None = None
        if isinstance(scaling, LinearScaling):
            self._scale = 1.0 / scaling.factor
        #: What multiplies queries and keys.
        self.gain = scaling.gain if isinstance(scaling, Yarn) else 1.0
        if isinstance(scaling, Llama3 | Yarn) or factors is not None:
            self._periods = mx.array(periods(head_dim, base, scaling), mx.float32)
        if factors is not None and self._periods is not None:
            self._periods = self._periods * factors
        plain = mx.array(periods(head_dim, base, None), mx.float32)
        self._all_periods = (plain if self._periods is None else self._periods) / self._scale
        # As `mx.fast.rope` computes them.
        slowing = mx.arange(0, -head_dim // 2, -1, dtype=mx.float32) * (2 * math.log(base) / head_dim)
        self._turns = mx.exp(slowing) if self._periods is None else 1 / self._periods
        mx.eval([self._all_periods, self._turns, *([] if self._periods is None else [self._periods])])

    @property
    def periods(self) -> mx.array:
        """(d/2,) float32: the pair i turns by position / periods[i]. For the kernel of one new token a row."""
        return self._all_periods

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """x (B, heads, T, d) at positions offset, offset + 1 …; `offset` is one for all rows or int32 (B,)."""
        if on_cpu() and x.shape[2] == 1 and isinstance(offset, mx.array):
            return self._turned(x, offset)
        base = None if self._periods is not None else self._base
        return mx.fast.rope(
            x, self._dim, traditional=False, base=base, scale=self._scale, offset=offset, freqs=self._periods
        )

    def _turned(self, x: mx.array, offset: mx.array) -> mx.array:
        """What `mx.fast.rope` does on a CPU with a new token a row. This way a compiled pass has one set of angles for
        all layers: MLX does not see that those of its own operations, seven a layer, are alike."""
        half = self._dim // 2
        angles = (offset.astype(mx.float32) * self._scale)[:, None, None, None] * self._turns
        cos, sin = mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return mx.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def periods(head_dim: int, base: float, scaling: Scaling) -> np.ndarray:
    periods = base ** (np.arange(0, head_dim, 2) / head_dim)
    if isinstance(scaling, Yarn):
        index = np.arange(head_dim // 2)
        divided = np.clip((index - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        stretched: np.ndarray = 1.0 / (divided / (scaling.factor * periods) + (1.0 - divided) / periods)
        return stretched
    if not isinstance(scaling, Llama3):
        return periods
    turns = scaling.original / (2 * math.pi * periods)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return periods / (kept + (1.0 - kept) / scaling.factor)


def head_sizes(fields: Fields) -> tuple[int, int]:
    """(numbers of a hidden state, heads) of a config.json. Raises `ModelError` for heads whose numbers do not pair:
    rotation turns two at a time."""
    dim, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if dim % heads or dim // heads % 2:
        raise ModelError(
            f"config.json: {fields.called('hidden_size')} is {dim}, and {fields.called('num_attention_heads')} {heads}"
            ": a head's size must be whole and even"
        )
    return dim, heads
