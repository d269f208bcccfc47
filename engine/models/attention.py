"""Scaled dot-product attention with grouped queries: one entry, the faster of two ways on each back-end."""

from __future__ import annotations

import mlx.core as mx

from engine.models.fastmath import exp_nonpositive, fast

#: None: every key. "causal": query i of T sees the keys up to L − T + i. A bool array (B or 1, 1, T or 1, L): True
#: where a key is seen.
Mask = mx.array | str | None

#: Queries that are multiplied with the keys at once: few, so that their scores stay in the processor's cache, and that
#: keys after the block are skipped.
_BLOCK = 64
#: Added to the score of an unseen key. Finite, so that a query that sees nothing (padding) gives no NaN.
_UNSEEN = -1e30


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None) -> mx.array:
    """softmax(scale · Q Kᵀ) V for queries (B, H, T, D), keys and values (B, K, L, D), K dividing H; (B, H, T, D).

    On a GPU this is `mx.fast.scaled_dot_product_attention`. The CPU back-end's form of that is built on exp and on
    reductions of rows that are not vectorised: matrix products with `fastmath` take about a fifth of its time.
    """
    if not fast(queries):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    queries = queries * scale
    if not isinstance(mask, str):
        return _attend(queries, keys, values, None if mask is None else _bias(mask))
    length, past = queries.shape[2], keys.shape[2] - queries.shape[2]
    if length == 1:
        return _attend(queries, keys, values, None)
    blocks = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        seen = mx.arange(past + end)[None, :] <= mx.arange(past + start, past + end)[:, None]
        block = queries[:, :, start:end]
        blocks.append(_attend(block, keys[:, :, : past + end], values[:, :, : past + end], _bias(seen[None, None])))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _bias(mask: mx.array) -> mx.array:
    """A mask (B, 1, T, L) as an addend to scores that are laid out (B, K, L, H/K, T)."""
    return mx.where(mask, 0.0, _UNSEEN).transpose(0, 1, 3, 2)[:, :, :, None]


def _attend(queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array | None) -> mx.array:
    """Attention of scaled queries. The scores are K Qᵀ: reductions over the last axis but one are vectorised."""
    batch, heads, length, dim = queries.shape
    groups = keys.shape[1]
    grouped = queries.reshape(batch, groups, -1, dim)
    scores = keys @ grouped.swapaxes(-1, -2)
    if bias is not None:
        scores = (scores.reshape(batch, groups, -1, heads // groups, length) + bias).reshape(scores.shape)
    # The softmax does not depend on what is subtracted, so no gradient need flow through the maximum.
    weights = exp_nonpositive(scores - mx.stop_gradient(scores.max(axis=-2, keepdims=True)))
    totals = weights.sum(axis=-2)[..., None]
    return ((weights.swapaxes(-1, -2) @ values) / totals).reshape(batch, heads, length, dim)
