"""Cross-entropy over a large vocabulary, a part of the logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from engine.models.fastmath import exp_nonpositive, fast
from engine.models.shard import Shard
from engine.platform.compiler import on_cpu

#: Logits held at once, at most. A GPU wants hundreds of rows a product: 256 MB in float32, 440 rows of a vocabulary of
#: 152,000. A CPU is as fast with few.
MAX_LOGITS, MAX_LOGITS_CPU = 1 << 26, 1 << 22


#: A logit of a column that stands for no token.
_NONE = -1e30


@dataclass(frozen=True)
class Columns:
    """This rank's columns of the logits of `vocabulary` tokens: as many on each rank, the last of which may lack some.

    Softmax over columns that are on several ranks is that of each rank's, times its share of the sum of exponentials
    (Milakov and Gimelshein 2018, arXiv:1805.02867; of a vocabulary that ranks share, Shoeybi et al. 2019,
    arXiv:1909.08053). So ranks exchange three numbers a row, and no logits.
    """

    shard: Shard
    vocabulary: int

    @property
    def first(self) -> int:
        return self.shard.rank * self.shard.rows_of(self.vocabulary)

    @property
    def present(self) -> int:
        """Those that stand for a token."""
        return max(0, min(self.shard.rows_of(self.vocabulary), self.vocabulary - self.first))

    def masked(self, logits: mx.array) -> mx.array:
        width = logits.shape[-1]
        return logits if self.present == width else mx.where(mx.arange(width) < self.present, logits, _NONE)

    def combined(self, norm: mx.array, likelihood: mx.array, total: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """log Σ exp, the target's logit (0 where it is on another rank) and the sum of logits, (rows,) each: of this
        rank's columns, and returned of all."""
        found = self.shard.joined(mx.stack([norm, likelihood, total])).reshape(3, self.shard.size, -1)
        return mx.logsumexp(found[0], axis=0), mx.sum(found[1], axis=0), mx.sum(found[2], axis=0)


def cross_entropy(
    head: Callable[[mx.array], mx.array],
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    smoothing: float = 0.0,
    columns: Columns | None = None,
) -> mx.array:
    """The sum over rows of weight · ((1 − s) · (−log p[target]) + s · mean over the vocabulary of −log p), in nats.

    `head` maps hidden states (rows, dim) to logits (rows, vocabulary), and is not trained; `targets`: int32 (rows,);
    `weights`: (rows,), 0 for rows that only pad. With `smoothing` s this is the cross-entropy against the mixture of
    the target and the uniform distribution (Szegedy et al. 2015, arXiv:1512.00567), torch's `label_smoothing`.
    `columns`: where `head` gives those of this rank alone, and the gradient of all; all ranks call it at the same time.

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
            loss, slope = _chunk(head, chunk, targets[part], weights[part], smoothing, columns)
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
    head: Callable[[mx.array], mx.array],
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    smoothing: float,
    columns: Columns | None,
) -> tuple[mx.array, mx.array]:
    """The chunk's loss, a scalar, and its slope in `hidden`."""
    logits = head(hidden)
    if columns is None:
        vocabulary = logits.shape[-1]
        norm, chances = _softmax(logits)
        likelihood = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        mean = mx.mean(logits, axis=-1)
    else:
        vocabulary, targets = columns.vocabulary, targets - columns.first
        norm, likelihood, mean, chances = _of_ranks(logits, targets, columns)
    losses = norm - (1.0 - smoothing) * likelihood
    # By comparison, not by a write at an index, which would copy the whole: this fuses with what is before and after.
    wanted = mx.arange(logits.shape[-1])[None] == targets[:, None]
    slope = chances - mx.where(wanted, 1.0 - smoothing, 0.0).astype(chances.dtype)
    if smoothing:
        losses = losses - smoothing * mean
        slope = slope - smoothing / vocabulary
    # Only the slope of `head` is taken here: its value was computed above, and this one is never evaluated.
    _, (slope,) = mx.vjp(head, [hidden], [slope * weights[:, None]])
    return mx.sum(losses * weights), slope


def _of_ranks(logits: mx.array, targets: mx.array, columns: Columns) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """log Σ exp, the target's logit and the mean logit of the whole vocabulary, (rows,) each, and the probabilities of
    this rank's columns. `targets`: as one counts these."""
    own, chances = _softmax(columns.masked(logits))
    here = (targets >= 0) & (targets < columns.present)
    likelihood = mx.take_along_axis(logits, mx.where(here, targets, 0)[:, None], axis=-1)[:, 0]
    total = mx.sum(logits[:, : columns.present], axis=-1)
    norm, likelihood, total = columns.combined(own, mx.where(here, likelihood, 0.0), total)
    return norm, likelihood, total / columns.vocabulary, chances * mx.exp(own - norm)[:, None]


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
