"""Attention as mlx-lm's files call it, over Stoker's keys and values and by its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import mlx.core as mx

from engine.models.attention import Mask, attention
from kernels.attend_stored import StoredAttention, attend_stored, fits


class StoredKv(NamedTuple):
    """All that a layer keeps, (slots, heads, capacity, width) each, numbers in `bits`. Row i sees the positions up to
    `offset[i]`, with `window` the last of them."""

    keys: mx.array
    values: mx.array
    offset: mx.array
    window: int | None
    bits: int


@runtime_checkable
class StoredPart(Protocol):
    """A layer's cache that can say what the arrays that it gave are a part of."""

    def stored(self, keys: mx.array, values: mx.array, mask: Mask) -> StoredKv | None: ...


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale · Q Kᵀ) V, (B, H, T, D), as the function of this name in mlx-lm's `models/base.py`.

    On a GPU, a new token a row is one launch over what is stored, and takes no mask.
    """
    if queries.shape[2] == 1 and (given := _stored(queries, keys, values, cache, scale, mask, sinks)):
        return attend_stored(given)
    if isinstance(mask, mx.array) and mask.ndim == 2:
        mask = mask[None, None]
    if sinks is None and (not isinstance(mask, mx.array) or mask.ndim == 4):
        return attention(queries, keys, values, scale=scale, mask=mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _stored(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Mask, sinks: mx.array | None
) -> StoredAttention | None:
    """What the kernel takes, if it can."""
    stored = cache.stored(keys, values, mask) if isinstance(cache, StoredPart) else None
    if stored is None:
        return None
    keys, values, offset, window, bits = stored
    given = StoredAttention(queries, keys, values, offset, scale, window, sinks, bits)
    return given if fits(given) else None
