"""From a vector a token to a vector a text."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from engine.models.encoder import Group, join, split
from engine.models.sentence import Pooling


def pool_packed(hidden: mx.array, groups: Sequence[Group], pooling: Pooling) -> mx.array:
    """`pool` of each group of a packed batch (N, dim): (texts, dim), float32, in the batch's order. Of several ways of
    pooling the vectors stand one behind the other."""
    if not isinstance(pooling, str):
        return mx.concatenate([pool_packed(hidden, groups, each) for each in pooling], axis=-1)
    parts = zip(split(hidden, groups), groups, strict=True)
    return join([pool(part, group.mask, pooling) for part, group in parts])


def pool(hidden: mx.array, mask: mx.array | None, pooling: str) -> mx.array:
    """(texts, tokens, dim) → (texts, dim), float32. `mask`: (texts, tokens) bool, None where no text is padded.

    As in sentence-transformers' Pooling module: `cls` is the first token and `lasttoken` the last that is none of
    padding, `max` the largest number of each dimension, `mean` the mean over the mask, `mean_sqrt_len_tokens` the sum
    by the root of the length, `weightedmean` a mean in which a token weighs as much as its position, from 1 on. Padding
    is on the right.
    """
    if pooling == "cls":
        return hidden[:, 0].astype(mx.float32)
    if pooling == "lasttoken":
        last = hidden[:, -1] if mask is None else hidden[mx.arange(hidden.shape[0]), mx.sum(mask, axis=1) - 1]
        return last.astype(mx.float32)
    hidden = hidden.astype(mx.float32)
    if pooling == "max":
        return mx.max(hidden if mask is None else mx.where(mask[..., None], hidden, -mx.inf), axis=1)
    if pooling == "mean" and mask is None:
        return mx.mean(hidden, axis=1)
    weights = mx.ones((1, hidden.shape[1])) if mask is None else mask.astype(mx.float32)
    if pooling == "weightedmean":
        weights = weights * mx.arange(1, hidden.shape[1] + 1)
    total = mx.sum(weights, axis=1, keepdims=True)
    # One matmul a batch instead of a masked copy of all hidden states.
    return (weights[:, None] @ hidden)[:, 0] / (mx.sqrt(total) if pooling == "mean_sqrt_len_tokens" else total)
