"""`sample` in MLX's own operations: a sort. What numbers that are none come to is in `kernels/sample/op.py`."""

from __future__ import annotations

import mlx.core as mx

from kernels.kernel import Arrays
from kernels.sample.arguments import Penalties, SampleInput

#: What a score less than this under the best one weighs is not drawn: e^−87 is the last normal float32.
FAINTEST = -87.0
#: A score at or below minus this is none.
SCORE_LIMIT = 4e37
#: What is finite of a raw logit, and of a temperature.
FINITE = 3e38
#: The smallest normal float32: a GPU may take what is smaller for 0.
SMALLEST = 1.17549435e-38


def adjusted(logits: mx.array, penalties: Penalties | None, allowed: mx.array | None) -> mx.array:
    """`logits` float32 (rows, vocabulary) after the penalties and the grammar of `sample`."""
    rows, vocabulary = logits.shape
    if penalties is not None:
        ids = mx.concatenate([penalties.seen_ids, mx.maximum(penalties.last, 0)[:, None]], axis=1)
        newest = (penalties.last >= 0).astype(mx.float32)[:, None]
        row = mx.arange(rows)[:, None]
        real = (mx.concatenate([penalties.seen, newest], axis=1) > 0).astype(mx.float32)
        entries = mx.concatenate([penalties.counts, newest], axis=1) * real
        seen = mx.zeros((rows, vocabulary)).at[row, ids].add(real) > 0
        counts = mx.zeros((rows, vocabulary)).at[row, ids].add(entries)
        repetition, presence, frequency = (array.reshape(rows, 1) for array in penalties[4:])
        logits = mx.where(seen, mx.where(logits < 0, logits * repetition, logits / repetition), logits)
        logits = logits - mx.where(counts > 0, presence + frequency * counts, 0.0)
    if allowed is not None:
        words = mx.repeat(allowed.astype(mx.uint32), 32, axis=-1)[:, :vocabulary]
        bits = mx.right_shift(words, mx.arange(vocabulary, dtype=mx.uint32)[None] % 32) & 1
        logits = mx.where(bits == 1, logits, -mx.inf)
    return logits


def finite(logits: mx.array) -> mx.array:
    """The raw logits as log-probabilities take them."""
    return mx.where(mx.isnan(logits), -FINITE, mx.clip(logits, -FINITE, FINITE))


def scored(
    logits: mx.array, temperature: mx.array, penalties: Penalties | None, allowed: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The scores of `logits` float32, and which rows `temperature` (rows, 1) leaves to chance: (rows, 1)."""
    warm = temperature >= SMALLEST
    scores = adjusted(logits, penalties, allowed) / mx.where(warm, mx.minimum(temperature, FINITE), 1.0)
    return mx.where(mx.isnan(scores), -SCORE_LIMIT, mx.clip(scores, -SCORE_LIMIT, SCORE_LIMIT)), warm


def reference(given: SampleInput) -> Arrays:
    """The results of `KERNEL`."""
    rows, vocabulary = given.logits.shape
    temperature, top_k, top_p, min_p, uniform, greedy = (array.reshape(rows, 1) for array in given[1:7])
    logits = given.logits.astype(mx.float32)
    scores, warm = scored(logits, temperature, given.penalties, given.allowed)
    greedy = greedy | ~warm
    best = mx.max(scores, axis=-1, keepdims=True)
    lowest = mx.where(greedy, best, _lowest(scores, best, top_k, top_p, min_p))
    kept = mx.where((scores >= lowest) & (scores > -SCORE_LIMIT), mx.exp(scores - best), 0.0)
    cumulative = mx.cumsum(kept, axis=-1)
    total = mx.sum(kept, axis=-1, keepdims=True)  # closer than the last of the running sums
    target = mx.where(greedy | mx.isnan(uniform), 0.0, mx.clip(uniform, 0.0, 1.0)) * cumulative[:, -1:]
    reached = (cumulative > target) & (kept > 0)
    last = vocabulary - 1 - mx.argmax(kept[:, ::-1] > 0, axis=-1)
    chosen = mx.where(mx.any(reached, axis=-1), mx.argmax(reached, axis=-1), last)
    chosen = mx.where(total[:, 0] > 0, chosen, 0)[:, None]
    likely = mx.where(greedy, 1.0, mx.take_along_axis(kept, chosen, axis=-1) / total)
    probability = mx.where(total > 0, likely, 0.0)[:, 0]
    raw = mx.take_along_axis(logits, chosen, axis=-1)[:, 0]
    shifted = finite(logits) - mx.max(finite(logits), axis=-1, keepdims=True)
    total_raw = mx.log(mx.sum(mx.exp(shifted), axis=-1))
    logprob = mx.take_along_axis(shifted, chosen, axis=-1)[:, 0] - total_raw
    return [chosen[:, 0].astype(mx.int32), raw, logprob, probability]


def _lowest(scores: mx.array, best: mx.array, top_k: mx.array, top_p: mx.array, min_p: mx.array) -> mx.array:
    """The smallest score that is kept, (rows, 1)."""
    vocabulary = scores.shape[-1]
    ranked = mx.sort(scores, axis=-1)[:, ::-1]
    kth = mx.take_along_axis(ranked, mx.where(top_k < 1, vocabulary, mx.minimum(top_k, vocabulary)) - 1, axis=-1)
    weights = mx.where(ranked >= kth, mx.exp(ranked - best), 0.0)
    cumulative = mx.cumsum(weights, axis=-1)
    inside = mx.sum(cumulative - weights < top_p * cumulative[:, -1:], axis=-1, keepdims=True)
    nucleus = mx.take_along_axis(ranked, mx.maximum(inside, 1) - 1, axis=-1)
    lowest = mx.maximum(kth, best + FAINTEST)
    lowest = mx.where(min_p > 0.0, mx.maximum(lowest, best + mx.log(min_p)), lowest)
    return mx.minimum(mx.where(top_p < 1.0, mx.maximum(lowest, nucleus), lowest), best)
