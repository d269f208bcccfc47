"""Scaled dot-product attention with grouped queries: one entry, the faster of two ways on each back-end."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from engine.models.fastmath import exp_nonpositive, fast

#: None: every key. "causal": query i of T sees the keys up to L − T + i. A bool array (B or 1, 1, T or 1, L): True
#: where a key is seen. A float array (B or 1, 1 or H, T or 1, L): added to the scores (a position bias).
Mask = mx.array | str | None

#: Queries that are multiplied with the keys at once: few, so that their scores stay in the processor's cache, and that
#: keys after the block are skipped.
_BLOCK = 64
#: Scores that are computed at once where every key is seen: 3 MiB, which the heap keeps (`engine.platform.heap`).
#: Larger arrays are mapped anew each time, and 512 tokens of 12 heads took two to three times as long.
_SCORES = 3 << 18
#: Added to the score of an unseen key. Finite, so that a query that sees nothing (padding) gives no NaN.
UNSEEN = -1e30


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: Mask = None,
    window: int | None = None,
) -> mx.array:
    """softmax(scale · Q Kᵀ) V for queries (B, H, T, D), keys (B, K, L, D) and values (B, K, L, V), K dividing H;
    (B, H, T, V).

    `window` narrows the mask "causal": a query sees itself and the window − 1 keys before. An array says it all itself.

    On a GPU this is `mx.fast.scaled_dot_product_attention`. The CPU back-end's form of that is built on exp and on
    reductions of rows that are not vectorised: matrix products with `fastmath` take about a fifth of its time.
    """
    length, past = queries.shape[2], keys.shape[2] - queries.shape[2]
    if window is not None and past + length <= window:
        window = None
    if not fast(queries):
        if mask == "causal" and window is not None:
            mask = _seen(past, past + length, 0, window)[None, None]
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    queries = queries * scale
    blocks = list(
        _attend_to_seen(queries, keys, values, window)
        if isinstance(mask, str)
        else _attend_to_all(queries, keys, values, mask)
    )
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def attention_nearby(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, reach: int, addend: mx.array | None
) -> mx.array:
    """The same for queries that see the keys at most `reach` before or after them: no others are multiplied.

    `addend`: (B, 1, 1, T), added to the scores of each key.
    """
    length, parts = queries.shape[2], []
    step = length if length <= reach + 1 else max(_BLOCK, 2 * reach)
    for start in range(0, length, step):
        end = min(start + step, length)
        first, last = max(0, start - reach), min(length, end + reach)
        mask = None if addend is None else addend[..., first:last]
        if length > reach + 1:
            far = mx.abs(mx.arange(start, end)[:, None] - mx.arange(first, last)) > reach
            band = mx.where(far, max(UNSEEN, mx.finfo(queries.dtype).min / 2), 0.0).astype(queries.dtype)[None, None]
            mask = band if mask is None else mask + band
        near = (array[:, :, first:last] for array in (keys, values))
        parts.append(attention(queries[:, :, start:end], *near, scale=scale, mask=mask))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _attend_to_seen(queries: mx.array, keys: mx.array, values: mx.array, window: int | None) -> Iterator[mx.array]:
    """Blocks of queries, each with the keys that it sees up to itself."""
    length, past = queries.shape[2], keys.shape[2] - queries.shape[2]
    for start in range(past, past + length, _BLOCK):
        end = min(start + _BLOCK, past + length)
        first = 0 if window is None else max(0, start + 1 - window)
        addend = None if end - start == 1 else _addend(_seen(start, end, first, window)[None, None], keys.shape[1])
        block = queries[:, :, start - past : end - past]
        yield _attend(block, keys[:, :, first:end], values[:, :, first:end], addend)


def _attend_to_all(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> Iterator[mx.array]:
    """Blocks of queries, each with all keys."""
    batch, heads, length, _ = queries.shape
    addend = None if mask is None else _addend(mask, keys.shape[1])
    step = max(_BLOCK, _SCORES // (batch * heads * keys.shape[2]))
    for start in range(0, length, step):
        part = addend if addend is None or addend.shape[-1] == 1 else addend[..., start : start + step]
        yield _attend(queries[:, :, start : start + step], keys, values, part)


def _seen(start: int, end: int, first: int, window: int | None) -> mx.array:
    """Which of the keys first … end − 1 the queries start … end − 1 see: bool (queries, keys)."""
    rows, columns = mx.arange(start, end)[:, None], mx.arange(first, end)[None, :]
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


def to_heads(x: mx.array, heads: int) -> mx.array:
    """(B, T, heads·D) to (B, heads, T, D); one operation for a token alone, (B, 1, heads·D) or (B, heads·D), which has
    nothing to change places with."""
    batch, *length, width = x.shape
    if length in ([], [1]):
        return x.reshape(batch, heads, 1, width // heads)
    return x.reshape(batch, *length, heads, width // heads).swapaxes(1, 2)


def from_heads(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """(B, heads, T, D) the same way back, to (*shape, heads·D)."""
    return (x if x.shape[2] == 1 else x.swapaxes(1, 2)).reshape(*shape, -1)


def _addend(mask: mx.array, groups: int) -> mx.array:
    """A mask (B, 1 or H, T, L) as an addend to scores that are laid out (B, K, L, H/K, T)."""
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, UNSEEN)
    batch, heads, *sides = mask.shape
    groups = min(groups, heads)
    return mask.reshape(batch, groups, heads // groups, *sides).transpose(0, 1, 4, 2, 3)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array | None) -> mx.array:
    """Attention of scaled queries. The scores are K Qᵀ: reductions over the second-to-last axis are vectorised."""
    batch, heads, length, dim = queries.shape
    groups = keys.shape[1]
    grouped = queries.reshape(batch, groups, -1, dim)
    scores = keys @ grouped.swapaxes(-1, -2)
    if bias is not None and length == 1:
        scores = scores + bias[..., 0]
    elif bias is not None:
        scores = (scores.reshape(batch, groups, -1, heads // groups, length) + bias).reshape(scores.shape)
    # The softmax does not depend on what is subtracted, so no gradient need flow through the maximum.
    weights = exp_nonpositive(scores - mx.stop_gradient(scores.max(axis=-2, keepdims=True)))
    totals = weights.sum(axis=-2, keepdims=True).swapaxes(-1, -2)
    return ((weights.swapaxes(-1, -2) @ values) / totals).reshape(batch, heads, length, values.shape[-1])
