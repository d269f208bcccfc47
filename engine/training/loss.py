"""Cross-entropy over a large vocabulary, a part of the logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx

from engine.models.fastmath import exp_nonpositive, fast
from engine.platform.compiler import on_cpu

#: Logits held at once, at most. A GPU wants hundreds of rows a product: 256 MB in float32, 440 rows of a vocabulary of
#: 152,000. A CPU is as fast with few.
MAX_LOGITS, MAX_LOGITS_CPU = 1 << 26, 1 << 22


def cross_entropy(
    head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, weights: mx.array, smoothing: float = 0.0
) -> mx.array:
    """The sum over rows of weight · ((1 − s) · (−log p[target]) + s · mean over the vocabulary of −log p), in nats.

    `head` maps hidden states (rows, dim) to logits (rows, vocabulary), and is not trained; `targets`: int32 (rows,);
    `weights`: (rows,), 0 for rows that only pad. With `smoothing` s this is the cross-entropy against the mixture of
    the target and the uniform distribution (Szegedy et al. 2015, arXiv:1512.00567), torch's `label_smoothing`.

    The head is frozen, so the gradient of a row's loss needs only its own logits: (softmax − wanted) · Wᵀ.
    It is made in the forward pass, chunk by chunk, while the chunk's logits are there; so they are computed once, and
    never all held (the way of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989).
    """

    @mx.custom_function
    def loss_and_slope(hidden: mx.array) -> tuple[mx.array, mx.array]:
        losses: list[mx.array] = []
        slopes: list[mx.array] = []
        rows = _rows_a_chunk(head, hidden)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            # A chunk begins when the one before is done: else MLX may compute the logits of all first.
            chunk = mx.depends([hidden[part]], [losses[-1], slopes[-1]])[0] if losses else hidden[part]
            loss, slope = _chunk(head, chunk, targets[part], weights[part], smoothing)
            losses.append(loss)
            slopes.append(slope)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total, mx.concatenate(slopes) if len(slopes) > 1 else slopes[0]

    @loss_and_slope.vjp
    def _(primals: object, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(hidden.dtype)

    loss, _ = cast("tuple[mx.array, mx.array]", loss_and_slope(hidden))
    return loss


def _rows_a_chunk(head: Callable[[mx.array], mx.array], hidden: mx.array) -> int:
    vocabulary = head(hidden[:1]).shape[-1]
    most = max(1, (MAX_LOGITS_CPU if on_cpu() else MAX_LOGITS) // vocabulary)
    # Chunks of the same size, rather than full ones and a small rest.
    count = -(-hidden.shape[0] // most)
    return -(-hidden.shape[0] // count)


def _chunk(
    head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, weights: mx.array, smoothing: float
) -> tuple[mx.array, mx.array]:
    """The chunk's loss, a scalar, and its slope in `hidden`."""
    logits = head(hidden)
    norm, chances = _softmax(logits)
    likelihood = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    losses = norm - (1.0 - smoothing) * likelihood
    # By comparison, not by a write at an index, which would copy the whole: this fuses with what is before and after.
    wanted = mx.arange(logits.shape[-1])[None] == targets[:, None]
    slope = chances - mx.where(wanted, 1.0 - smoothing, 0.0).astype(chances.dtype)
    if smoothing:
        losses = losses - smoothing * mx.mean(logits, axis=-1)
        slope = slope - smoothing / logits.shape[-1]
    # Only the slope of `head` is taken here: its value was computed above, and this one is never evaluated.
    _, (slope,) = mx.vjp(head, [hidden], [slope * weights[:, None]])
    return mx.sum(losses * weights), slope


def _softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """log Σ exp, (rows,), and the probabilities, (rows, vocabulary).

    MLX's exp takes 20 ns an element on a CPU, and a step has 25 million of them; so there it is taken once, by the
    polynomial. A GPU rather reads the logits twice than write an exponential to memory.
    """
    if not fast(logits):
        norm = mx.logsumexp(logits, axis=-1)
        return norm, mx.exp(logits - norm[:, None])
    peak = mx.max(logits, axis=-1, keepdims=True)
    powers = exp_nonpositive(logits - peak)
    total = mx.sum(powers, axis=-1, keepdims=True)
    return (peak + mx.log(total))[:, 0], powers / total
