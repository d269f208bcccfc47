"""From logits to tokens, for a batch in which every row has its own parameters.

Two halves: `sampling_batch` (host) turns what the rows ask for into arrays, one row each; `choose` (device, pure) turns
logits and these arrays into (chosen, raw, logprob, probability). `choose` is traced into the compiled decode step, and
is where a fused kernel takes over.

Order, as in transformers (`GenerationMixin._get_logits_processor`): bias, repetition penalty, presence and frequency
penalty (which transformers lacks; OpenAI's definition), grammar, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from engine.generation.draws import Draw, Pick
from engine.generation.sampling_batch import (
    PenaltyParameters,
    RandomParameters,
    RankParameters,
    SamplingBatch,
    sampling_batch,
)
from engine.models.fastmath import above, exp_nonpositive, fast
from kernels.greedy import KERNEL as GREEDY
from kernels.greedy import greedy as fused_greedy
from kernels.sample import FAINTEST, Penalties, SampleInput, adjusted
from kernels.sample import KERNEL as SAMPLE
from kernels.sample import sample as fused_sample

#: How far below the best score a nucleus ends at most: all the scores of a vocabulary that are further away are less
#: than a float32 sees next to it. Halvings of that, which leave 2e-6.
FAR, HALVINGS = 32.0, 24


def sample(logits: mx.array, draws: Sequence[Draw]) -> list[Pick]:
    """Choose one token a row. `logits`: (rows, vocabulary) float32."""
    return picks(choose(logits, sampling_batch(draws, logits.shape[-1])), draws)


def picks(chosen: tuple[mx.array, ...], draws: Sequence[Draw]) -> list[Pick]:
    """What `choose` returned, as numbers; rows beyond `draws` are padding. Waits for the device."""
    mx.eval(chosen)
    tokens, raw, logprob, probability = (np.array(array).tolist() for array in chosen[:4])
    found = [Pick(*fields) for fields in zip(tokens, raw, logprob, probability, strict=True)][: len(draws)]
    if len(chosen) == 4:
        return found
    ids, logprobs = (np.array(array).tolist() for array in chosen[4:])
    return [
        pick
        if not (wanted := draw.request.top_logprobs)
        else Pick(
            pick.token_id,
            pick.logit,
            pick.logprob,
            pick.probability,
            tuple(zip(ids[row][:wanted], logprobs[row][:wanted], strict=True)),
        )
        for row, (pick, draw) in enumerate(zip(found, draws, strict=True))
    ]


def choose(logits: mx.array, sampling: SamplingBatch, last: mx.array | None = None) -> tuple[mx.array, ...]:
    """(chosen int32, raw, logprob, probability float32), each (rows,); alternatives' ids and logprobs if asked for.

    `logits`: (rows, vocabulary), in the model's dtype. `last`: int32 (rows,), each row's newest token; the penalties
    count it where `sampling` says that it is fresh. A row whose logits are not finite has a `raw` that is NaN.
    """
    if sampling.likeliest and GREEDY.active:
        found = fused_greedy(logits)
        if not sampling.alternatives:
            return found
        logits = logits.astype(mx.float32)
        return *found, *_alternatives(logits, _log_total(logits), sampling.alternatives)
    if sampling.random is not None and sampling.bias is None and SAMPLE.active:
        chosen, raw, *rest = _fused(logits, sampling, sampling.random, last)
    else:
        chosen, raw, *rest = _plain(logits, sampling, last)
    # Of numbers that are not finite no choice can be made, and a comparison hides them: the row is marked.
    sound = mx.all(logits < mx.inf, axis=-1)
    return mx.where(sound, chosen, 0), mx.where(sound, raw, mx.nan), *rest


def _plain(logits: mx.array, sampling: SamplingBatch, last: mx.array | None) -> tuple[mx.array, ...]:
    """`choose` in MLX's own operations."""
    logits = logits.astype(mx.float32)
    total = _log_total(logits)
    scores = process(logits, sampling, last)
    chosen = mx.argmax(scores, axis=-1)
    probability = mx.ones(chosen.shape)
    if sampling.random is not None:
        drawn, likely = _draw(scores, sampling.random)
        greedy = sampling.random.greedy[:, 0]
        chosen, probability = mx.where(greedy, chosen, drawn), mx.where(greedy, probability, likely)
    raw = mx.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    found = (chosen.astype(mx.int32), raw, raw - total, probability)
    return (*found, *_alternatives(logits, total, sampling.alternatives)) if sampling.alternatives else found


def _fused(
    logits: mx.array, sampling: SamplingBatch, random: RandomParameters, last: mx.array | None
) -> tuple[mx.array, ...]:
    """`choose` by a kernel that sorts nothing."""
    rows, ranks = logits.shape[0], random.ranks
    sampled = fused_sample(
        SampleInput(
            logits,
            temperature=random.temperature,
            top_k=mx.zeros((rows, 1), mx.int32) if ranks is None else ranks.top_k,
            top_p=mx.ones((rows, 1)) if ranks is None else ranks.top_p,
            min_p=random.min_p,
            uniform=random.uniform,
            greedy=random.greedy,
            penalties=_penalties(sampling.penalties, last, rows),
            allowed=sampling.mask,
        )
    )
    if not sampling.alternatives:
        return sampled
    logits = logits.astype(mx.float32)
    return *sampled, *_alternatives(logits, _log_total(logits), sampling.alternatives)


def _penalties(given: PenaltyParameters | None, last: mx.array | None, rows: int) -> Penalties | None:
    """What `given` says of the tokens so far, the newest among them where it is fresh."""
    if given is None:
        return None
    newest = mx.full((rows,), -1, mx.int32)
    if last is not None and given.fresh is not None:
        newest = mx.where(given.fresh[:, 0] > 0, last, newest)
    return Penalties(
        given.seen_ids,
        given.seen,
        given.counts,
        newest,
        given.repetition,
        given.presence,
        given.frequency,
    )


def process(logits: mx.array, sampling: SamplingBatch, last: mx.array | None = None) -> mx.array:
    """The logits after bias, penalties and grammar: what temperature and truncation then work on."""
    if sampling.bias is not None:
        rows = mx.arange(logits.shape[0])[:, None]
        logits = logits.at[rows, sampling.bias.ids].add(sampling.bias.values)
    return adjusted(logits, _penalties(sampling.penalties, last, logits.shape[0]), sampling.mask)


def warp(scores: mx.array, random: RandomParameters) -> mx.array:
    """Scores over temperature, −inf where top-k, top-p or min-p cut; tokens of equal score are cut or kept together."""
    scaled = scores / random.temperature
    best = mx.max(scaled, axis=-1, keepdims=True)
    floor = mx.maximum(best + FAINTEST, best + mx.log(random.min_p))
    if random.ranks is not None:
        floor = mx.maximum(floor, _ranked_floor(scaled, best, random.ranks))
    return mx.where(scaled >= floor, scaled, -mx.inf)


def _draw(scores: mx.array, random: RandomParameters) -> tuple[mx.array, mx.array]:
    """Inverse-CDF sampling over the kept tokens in the order of the vocabulary: (token, probability), each (rows,).

    In that order nothing has to be sorted unless a row asks for top-k or top-p, and then only to find the smallest
    score that is kept.
    """
    kept = warp(scores, random)
    weights = mx.where(kept > -mx.inf, exp_nonpositive(kept - mx.max(kept, axis=-1, keepdims=True)), 0.0)
    cumulative = mx.cumsum(weights, axis=-1)
    total = cumulative[:, -1:]
    reached = (cumulative > random.uniform * total) & (weights > 0)
    # Rounding may leave u·total beyond the last kept token: then it is the best one.
    position = mx.where(mx.any(reached, axis=-1), mx.argmax(reached, axis=-1), mx.argmax(kept, axis=-1))
    return position, (mx.take_along_axis(weights, position[:, None], axis=-1) / total)[:, 0]


def _ranked_floor(scaled: mx.array, best: mx.array, ranks: RankParameters) -> mx.array:
    """The smallest score that top-k and then top-p (on what top-k left, renormalised) keep: (rows, 1). A row's is found
    in one way, by what it asks for itself."""
    vocabulary = scaled.shape[-1]
    if not (ranks.alone and fast(scaled)):
        return _sorted_floor(scaled, best, ranks, vocabulary if ranks.alone else ranks.width)
    floor = mx.where(ranks.top_p >= 1.0, -mx.inf, _nucleus(scaled, best, ranks.top_p))
    if not ranks.width:
        return floor
    return mx.where(ranks.top_k >= vocabulary, floor, _sorted_floor(scaled, best, ranks, ranks.width))


def _sorted_floor(scaled: mx.array, best: mx.array, ranks: RankParameters, width: int) -> mx.array:
    """The same, with so many of the largest scores put in order."""
    vocabulary = scaled.shape[-1]
    largest = scaled if width == vocabulary else mx.topk(scaled, width, axis=-1)
    ranked = mx.sort(largest, axis=-1)[:, ::-1]
    top_k, top_p = ranks.top_k, ranks.top_p
    kth = mx.take_along_axis(ranked, mx.minimum(top_k, width) - 1, axis=-1)
    kth = mx.where(top_k >= vocabulary, -mx.inf, kth)
    weights = mx.where(ranked >= kth, exp_nonpositive(mx.minimum(ranked - best, 0.0)), 0.0)
    cumulative = mx.cumsum(weights, axis=-1)
    inside = mx.sum(cumulative - weights < top_p * cumulative[:, -1:], axis=-1, keepdims=True)
    nucleus = mx.take_along_axis(ranked, mx.maximum(inside, 1) - 1, axis=-1)
    return mx.where(top_p >= 1.0, kth, mx.maximum(kth, nucleus))


def _nucleus(scaled: mx.array, best: mx.array, top_p: mx.array) -> mx.array:
    """What top-p keeps lies above this, (rows, 1), and nothing else does: found by halving, as in samplers of GPUs that
    sort nothing (Ye et al., FlashInfer, 2025). Scores that differ by 2e-6 may count as equal."""
    # In lines of 128: the CPU back-end sums columns four times as fast as rows.
    rows, vocabulary = scaled.shape
    scores = mx.pad(scaled, [(0, 0), (0, -vocabulary % 128)], constant_values=-mx.inf).reshape(rows, -1, 128)
    low, high = best[:, None] - FAR, best[:, None]
    weights = exp_nonpositive(mx.minimum(scores - high, 0.0))
    wanted = top_p[:, None] * _total(weights)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = _total(above(scores, weights, middle)) >= wanted
        low, high = mx.where(enough, middle, low), mx.where(enough, high, middle)
    return low[:, 0]


def _total(x: mx.array) -> mx.array:
    """Of each row's lines, (rows, 1, 1)."""
    return x.sum(axis=1, keepdims=True).sum(axis=2, keepdims=True)


def _log_total(logits: mx.array) -> mx.array:
    """log Σ e^logit, (rows,)."""
    if not fast(logits):
        return mx.logsumexp(logits, axis=-1)
    # The CPU back-end's logsumexp takes 0.8 ms a row of 49,152; this a tenth of it.
    best = mx.max(logits, axis=-1, keepdims=True)
    return (best + mx.log(mx.sum(exp_nonpositive(logits - best), axis=-1, keepdims=True)))[:, 0]


def _alternatives(logits: mx.array, total: mx.array, count: int) -> tuple[mx.array, mx.array]:
    ids = mx.argpartition(-logits, count - 1, axis=-1)[:, :count]
    found = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-found, axis=-1)
    return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(found, order, axis=-1) - total[:, None]
