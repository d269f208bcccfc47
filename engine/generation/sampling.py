"""From logits to tokens, for a batch in which every row has its own parameters.

Two halves: `sampling_batch` (host) turns what the rows ask for into arrays, one row each; `choose` (device, pure) turns
logits and these arrays into (chosen, raw, logprob, probability). `choose` is traced into the compiled decode step, and
is where a fused kernel takes over.

Order, as in transformers (`GenerationMixin._get_logits_processor`): bias, repetition penalty, presence and frequency
penalty (which transformers lacks; OpenAI's definition), grammar, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from engine.models.fastmath import exp_nonpositive, fast
from kernels.sample import FAINTEST, Penalties, SampleInput, adjusted
from kernels.sample import KERNEL as SAMPLE
from kernels.sample import sample as fused_sample
from stoker.contract import GenerateRequest

V = TypeVar("V")

#: The largest float32 below 1: a uniform number that is rounded up to 1 would lie beyond every token.
_BELOW_ONE = 1.0 - 2.0**-24
#: Alternatives that are found when any row asks for some: the contract's most.
ALTERNATIVES = 20
#: Philox numbers that are drawn at once.
_BLOCK = 64

#: Parameters of a batch: arrays with a row for each sequence, and the few numbers that choose how it is computed.
SamplingBatch = dict[str, Any]


def uniforms(seed: int, position: int, count: int, completion: int = 0) -> np.ndarray:
    """`count` numbers in [0, 1) for the tokens at `position` and after it: float64.

    Philox is counter-based (Salmon et al. 2011): a number depends on (seed, completion, position) alone, so the same
    request draws the same alone, in any batch, on any back-end, and when another worker goes on with it.
    """
    # A counter gives four numbers; the first is the position's.
    raw = np.random.Philox(key=seed, counter=position | completion << 64).random_raw(4 * count)[::4]
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53)


class Uniforms:
    """The same, one at a time, for one row: a block of them costs as much as one."""

    def __init__(self, seed: int, completion: int = 0) -> None:
        self._seed, self._completion = seed, completion
        self._first, self._block = 0, np.empty(0)

    def __call__(self, position: int) -> float:
        if not self._first <= position < self._first + len(self._block):
            self._first, self._block = position, uniforms(self._seed, position, _BLOCK, self._completion)
        return float(self._block[position - self._first])


@dataclass(frozen=True)
class Draw:
    """How one row's next token is sampled. `uniform`: its number in [0, 1).

    `tally`: token → how often the answer has it, those of the prompt included (with 0): what the penalties count.
    `fresh`: the row's newest token is not in the tally yet, because only the device knows it so far.
    `mask`: bits of the tokens that a grammar allows, int32 (vocabulary / 32, rounded up); None: all.
    """

    request: GenerateRequest
    uniform: float
    tally: Mapping[int, int] = field(default_factory=dict)
    mask: np.ndarray | None = None
    fresh: bool = False

    @property
    def greedy(self) -> bool:
        return self.request.temperature == 0.0

    @property
    def ranked(self) -> bool:
        """Whether its parameters need the order of the logits."""
        return not self.greedy and (self.request.top_k > 0 or self.request.top_p < 1.0)

    @property
    def penalised(self) -> bool:
        return penalised(self.request)


def penalised(request: GenerateRequest) -> bool:
    """Whether the tokens so far change the logits of the next one."""
    return (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Pick:
    token_id: int
    #: The raw model's.
    logit: float
    logprob: float
    #: Of the distribution sampled from.
    probability: float
    #: The raw model's likeliest tokens with their logprobs, best first, as many as the request asks for.
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the model gave numbers of which a choice could be made."""
        return all(map(math.isfinite, (self.logit, self.logprob, self.probability)))


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


# --- host: parameters to arrays ---


def sampling_batch(draws: Sequence[Draw], vocabulary: int, rows: int | None = None) -> SamplingBatch:
    """The rows' parameters, padded to `rows` with greedy rows. What no row asks for is left out, and costs nothing.

    Shapes vary by powers of two only, so that few of them are ever compiled.
    """
    rows = rows or len(draws)
    made: SamplingBatch = {}
    if not all(draw.greedy for draw in draws):
        made |= _draw_parameters(draws, vocabulary, rows)
    if any(draw.penalised for draw in draws):
        made |= _penalty_parameters(draws, vocabulary, rows)
    if any(draw.request.logit_bias for draw in draws):
        made |= _bias_parameters(draws, vocabulary, rows)
    if any(draw.mask is not None for draw in draws):
        made["mask"] = _mask(draws, vocabulary, rows)
    if any(draw.request.top_logprobs for draw in draws):
        made["alternatives"] = min(ALTERNATIVES, vocabulary)
    return made


def _draw_parameters(draws: Sequence[Draw], vocabulary: int, rows: int) -> SamplingBatch:
    requests = [draw.request for draw in draws]
    made: SamplingBatch = {
        "greedy": _column([draw.greedy for draw in draws], rows, True, np.bool_),
        "temperature": _column([r.temperature or 1.0 for r in requests], rows, 1.0),
        "min_p": _column([r.min_p for r in requests], rows, 0.0),
        "uniform": _column([min(draw.uniform, _BELOW_ONE) for draw in draws], rows, 0.0),
    }
    ranked = [draw for draw in draws if draw.ranked]
    if ranked:
        made["top_k"] = _column([min(r.top_k or vocabulary, vocabulary) for r in requests], rows, vocabulary, np.int32)
        made["top_p"] = _column([r.top_p for r in requests], rows, 1.0)
        # Only so many of the largest logits have to be put in order.
        made["width"] = _power(max(draw.request.top_k or vocabulary for draw in ranked), vocabulary)
    return made


def _penalty_parameters(draws: Sequence[Draw], vocabulary: int, rows: int) -> SamplingBatch:
    tallies = [_within(draw.tally, vocabulary) if draw.penalised else {} for draw in draws]
    requests = [draw.request for draw in draws]
    width = _power(max(map(len, tallies)))
    fresh = [draw.fresh and draw.penalised for draw in draws]
    return {
        **({"fresh": _column(fresh, rows, 0.0)} if any(fresh) else {}),
        "seen_ids": _ragged([list(tally) for tally in tallies], rows, width, np.int32),
        "seen": _ragged([[1.0] * len(tally) for tally in tallies], rows, width, np.float32),
        "counts": _ragged([list(tally.values()) for tally in tallies], rows, width, np.float32),
        "repetition": _column([r.repetition_penalty for r in requests], rows, 1.0),
        "presence": _column([r.presence_penalty for r in requests], rows, 0.0),
        "frequency": _column([r.frequency_penalty for r in requests], rows, 0.0),
    }


def _within(values: Mapping[int, V], vocabulary: int) -> dict[int, V]:
    """Without tokens that have no logit: MLX's scatter trusts its indices, and writes beyond the array."""
    return {token: value for token, value in values.items() if token < vocabulary}


def _bias_parameters(draws: Sequence[Draw], vocabulary: int, rows: int) -> SamplingBatch:
    biases = [_within(draw.request.logit_bias or {}, vocabulary) for draw in draws]
    width = _power(max(map(len, biases)))
    return {
        "bias_ids": _ragged([list(bias) for bias in biases], rows, width, np.int32),
        "bias": _ragged([list(bias.values()) for bias in biases], rows, width, np.float32),
    }


def _mask(draws: Sequence[Draw], vocabulary: int, rows: int) -> mx.array:
    masks = np.full((rows, -(-vocabulary // 32)), -1, dtype=np.int32)
    for row, draw in enumerate(draws):
        if draw.mask is not None:
            # A model's logits may be padded beyond the tokenizer's vocabulary: those are never allowed.
            masks[row] = 0
            masks[row, : len(draw.mask)] = draw.mask[: masks.shape[1]]
    return mx.array(masks)


def _power(least: int, most: int | None = None) -> int:
    """The smallest power of two, from 8 on, that is at least `least`; at most `most`."""
    power = 1 << max(3, math.ceil(math.log2(max(1, least))))
    return power if most is None else min(power, most)


def _column(values: Sequence[float], rows: int, padding: float, dtype: Any = np.float32) -> mx.array:
    made = np.full((rows, 1), padding, dtype=dtype)
    made[: len(values), 0] = values
    return mx.array(made)


def _ragged(values: Sequence[Sequence[float]], rows: int, width: int, dtype: Any) -> mx.array:
    made = np.zeros((rows, width), dtype=dtype)
    for row, line in enumerate(values):
        made[row, : len(line)] = line
    return mx.array(made)


# --- device: logits and parameters to tokens ---


def choose(logits: mx.array, sampling: SamplingBatch, last: mx.array | None = None) -> tuple[mx.array, ...]:
    """(chosen int32, raw, logprob, probability float32), each (rows,); alternatives' ids and logprobs if asked for.

    `logits`: (rows, vocabulary), in the model's dtype. `last`: int32 (rows,), each row's newest token; the penalties
    count it where `sampling` says that it is fresh. A row whose logits are not finite has a `raw` that is NaN.
    """
    fused = "temperature" in sampling and "bias_ids" not in sampling and SAMPLE.active
    chosen, raw, *rest = _fused(logits, sampling, last) if fused else _plain(logits, sampling, last)
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
    if "temperature" in sampling:
        drawn, likely = _draw(scores, sampling)
        greedy = sampling["greedy"][:, 0]
        chosen, probability = mx.where(greedy, chosen, drawn), mx.where(greedy, probability, likely)
    raw = mx.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    found = (chosen.astype(mx.int32), raw, raw - total, probability)
    return (*found, *_alternatives(logits, total, sampling["alternatives"])) if "alternatives" in sampling else found


def _fused(logits: mx.array, sampling: SamplingBatch, last: mx.array | None) -> tuple[mx.array, ...]:
    """`choose` by a kernel that sorts nothing."""
    rows, ranked = logits.shape[0], "top_k" in sampling
    sampled = fused_sample(
        SampleInput(
            logits,
            temperature=sampling["temperature"],
            top_k=sampling["top_k"] if ranked else mx.zeros((rows, 1), mx.int32),
            top_p=sampling["top_p"] if ranked else mx.ones((rows, 1)),
            min_p=sampling["min_p"],
            uniform=sampling["uniform"],
            greedy=sampling["greedy"],
            penalties=_penalties(sampling, last, rows),
            allowed=sampling.get("mask"),
        )
    )
    if "alternatives" not in sampling:
        return sampled
    logits = logits.astype(mx.float32)
    return *sampled, *_alternatives(logits, _log_total(logits), sampling["alternatives"])


def _penalties(sampling: SamplingBatch, last: mx.array | None, rows: int) -> Penalties | None:
    """What `sampling` says of the tokens so far, the newest among them where it is fresh."""
    if "seen_ids" not in sampling:
        return None
    newest = mx.full((rows,), -1, mx.int32)
    if last is not None:
        newest = mx.where(sampling["fresh"][:, 0] > 0, last, newest)
    names = ("seen_ids", "seen", "counts", "repetition", "presence", "frequency")
    return Penalties(last=newest, **{name: sampling[name] for name in names})


def process(logits: mx.array, sampling: SamplingBatch, last: mx.array | None = None) -> mx.array:
    """The logits after bias, penalties and grammar: what temperature and truncation then work on."""
    if "bias_ids" in sampling:
        rows = mx.arange(logits.shape[0])[:, None]
        logits = logits.at[rows, sampling["bias_ids"]].add(sampling["bias"])
    return adjusted(logits, _penalties(sampling, last, logits.shape[0]), sampling.get("mask"))


def warp(scores: mx.array, sampling: SamplingBatch) -> mx.array:
    """Scores over temperature, −inf where top-k, top-p or min-p cut; tokens of equal score are cut or kept together."""
    scaled = scores / sampling["temperature"]
    best = mx.max(scaled, axis=-1, keepdims=True)
    floor = mx.maximum(best + FAINTEST, best + mx.log(sampling["min_p"]))
    if "top_k" in sampling:
        floor = mx.maximum(floor, _ranked_floor(scaled, best, sampling))
    return mx.where(scaled >= floor, scaled, -mx.inf)


def _draw(scores: mx.array, sampling: SamplingBatch) -> tuple[mx.array, mx.array]:
    """Inverse-CDF sampling over the kept tokens in the order of the vocabulary: (token, probability), each (rows,).

    In that order nothing has to be sorted unless a row asks for top-k or top-p, and then only to find the smallest
    score that is kept.
    """
    kept = warp(scores, sampling)
    weights = mx.where(kept > -mx.inf, exp_nonpositive(kept - mx.max(kept, axis=-1, keepdims=True)), 0.0)
    cumulative = mx.cumsum(weights, axis=-1)
    total = cumulative[:, -1:]
    reached = (cumulative > sampling["uniform"] * total) & (weights > 0)
    # Rounding may leave u·total beyond the last kept token: then it is the best one.
    position = mx.where(mx.any(reached, axis=-1), mx.argmax(reached, axis=-1), mx.argmax(kept, axis=-1))
    return position, (mx.take_along_axis(weights, position[:, None], axis=-1) / total)[:, 0]


def _ranked_floor(scaled: mx.array, best: mx.array, sampling: SamplingBatch) -> mx.array:
    """The smallest score that top-k and then top-p (on what top-k left, renormalised) keep: (rows, 1)."""
    vocabulary, width = scaled.shape[-1], sampling["width"]
    largest = scaled if width == vocabulary else mx.topk(scaled, width, axis=-1)
    ranked = mx.sort(largest, axis=-1)[:, ::-1]
    top_k, top_p = sampling["top_k"], sampling["top_p"]
    kth = mx.take_along_axis(ranked, mx.minimum(top_k, width) - 1, axis=-1)
    kth = mx.where(top_k >= vocabulary, -mx.inf, kth)
    weights = mx.where(ranked >= kth, exp_nonpositive(mx.minimum(ranked - best, 0.0)), 0.0)
    cumulative = mx.cumsum(weights, axis=-1)
    inside = mx.sum(cumulative - weights < top_p * cumulative[:, -1:], axis=-1, keepdims=True)
    nucleus = mx.take_along_axis(ranked, mx.maximum(inside, 1) - 1, axis=-1)
    return mx.where(top_p >= 1.0, kth, mx.maximum(kth, nucleus))


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
