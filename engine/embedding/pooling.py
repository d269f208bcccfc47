"""From a vector a token to a vector a text."""

from __future__ import annotations

import mlx.core as mx


def pool(hidden: mx.array, mask: mx.array | None, pooling: str) -> mx.array:
    """(texts, tokens, dim) → (texts, dim), float32. `mask`: (texts, tokens) bool, None where no text is padded.

    `mean` is the mean over the mask, `cls` the first token and `lasttoken` the last that is none of padding, as in
    sentence-transformers' Pooling module. Padding is on the right.
    """
    hidden = hidden.astype(mx.float32)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "lasttoken":
        if mask is None:
            return hidden[:, -1]
        return hidden[mx.arange(hidden.shape[0]), mx.sum(mask, axis=1) - 1]
    if mask is None:
        return mx.mean(hidden, axis=1)
    weights = mask.astype(mx.float32)
    # One matmul a batch instead of a masked copy of all hidden states.
    return (weights[:, None] @ hidden)[:, 0] / mx.sum(weights, axis=1, keepdims=True)
