"""How the rows of a batch are sampled, as arrays of a row each. What no row asks for is None and costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import DTypeLike

from engine.generation.draws import Draw

V = TypeVar("V")

#: The largest float32 below 1: a uniform number that is rounded up to 1 would lie beyond every token.
_BELOW_ONE = 1.0 - 2.0**-24
#: Alternatives that are found when any row asks for some: the contract's most.
ALTERNATIVES = 20


@dataclass(frozen=True, eq=False)
class RankParameters:
    """top-k and top-p, (rows, 1). `width`: of the largest logits, at most so many are kept by top-k; 0: no row asks for
    it. `alone`: whether a row asks for top-p without it."""

    top_k: mx.array
    top_p: mx.array
    width: int
    alone: bool


@dataclass(frozen=True, eq=False)
class RandomParameters:
    """(rows, 1) each. `ranks`: None if no row needs the order of its logits."""

    greedy: mx.array
    temperature: mx.array
    min_p: mx.array
    uniform: mx.array
    ranks: RankParameters | None


@dataclass(frozen=True, eq=False)
class PenaltyParameters:
    """The tokens so far, (rows, width) each, and what they cost, (rows, 1) each.

    `fresh`: 1 for a row whose newest token is not among them; None if there is no such row.
    """

    seen_ids: mx.array
    seen: mx.array
    counts: mx.array
    repetition: mx.array
    presence: mx.array
    frequency: mx.array
    fresh: mx.array | None


@dataclass(frozen=True, eq=False)
class BiasParameters:
    """What is added to which tokens' logits, (rows, width) each."""

    ids: mx.array
    values: mx.array


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """`random`: None if every row is greedy. `mask`: bits of allowed tokens, int32 (rows, vocabulary / 32, rounded up).
    `alternatives`: how many of the likeliest tokens are found for each row."""

    random: RandomParameters | None = None
    penalties: PenaltyParameters | None = None
    bias: BiasParameters | None = None
    mask: mx.array | None = None
    alternatives: int = 0

    @property
    def likeliest(self) -> bool:
        """Whether each row takes the token of its largest logit, as the model gives it."""
        return self.random is None and self.penalties is None and self.bias is None and self.mask is None

    @property
    def counts_newest(self) -> bool:
        """Whether a row's newest token has to be counted on the device."""
        return self.penalties is not None and self.penalties.fresh is not None


def sampling_batch(draws: Sequence[Draw], vocabulary: int, rows: int | None = None) -> SamplingBatch:
    """The rows' parameters, padded to `rows` with greedy rows. What no row asks for is left out, and costs nothing.

    Shapes vary by powers of two only, so that few of them are ever compiled.
    """
    rows = rows or len(draws)
    return SamplingBatch(
        random=None if all(draw.greedy for draw in draws) else _random(draws, vocabulary, rows),
        penalties=_penalties(draws, vocabulary, rows) if any(draw.penalised for draw in draws) else None,
        bias=_bias(draws, vocabulary, rows) if any(draw.request.logit_bias for draw in draws) else None,
        mask=_mask(draws, vocabulary, rows) if any(draw.mask is not None for draw in draws) else None,
        alternatives=min(ALTERNATIVES, vocabulary) if any(draw.request.top_logprobs for draw in draws) else 0,
    )


def _random(draws: Sequence[Draw], vocabulary: int, rows: int) -> RandomParameters:
    requests = [draw.request for draw in draws]
    return RandomParameters(
        greedy=_column([draw.greedy for draw in draws], rows, True, np.bool_),
        temperature=_column([r.temperature or 1.0 for r in requests], rows, 1.0),
        min_p=_column([r.min_p for r in requests], rows, 0.0),
        uniform=_column([min(draw.uniform, _BELOW_ONE) for draw in draws], rows, 0.0),
        ranks=_ranks(draws, vocabulary, rows) if any(draw.ranked for draw in draws) else None,
    )


def _ranks(draws: Sequence[Draw], vocabulary: int, rows: int) -> RankParameters:
    requests = [draw.request for draw in draws]
    return RankParameters(
        top_k=_column([min(r.top_k or vocabulary, vocabulary) for r in requests], rows, vocabulary, np.int32),
        top_p=_column([r.top_p for r in requests], rows, 1.0),
        width=_power(most, vocabulary) if (most := max(r.top_k for r in requests)) else 0,
        alone=any(draw.ranked and not draw.request.top_k for draw in draws),
    )


def _penalties(draws: Sequence[Draw], vocabulary: int, rows: int) -> PenaltyParameters:
    tallies = [_within(draw.tally, vocabulary) if draw.penalised else {} for draw in draws]
    requests = [draw.request for draw in draws]
    width = _power(max(map(len, tallies)))
    fresh = [draw.fresh and draw.penalised for draw in draws]
    return PenaltyParameters(
        seen_ids=_ragged([list(tally) for tally in tallies], rows, width, np.int32),
        seen=_ragged([[1.0] * len(tally) for tally in tallies], rows, width, np.float32),
        counts=_ragged([list(tally.values()) for tally in tallies], rows, width, np.float32),
        repetition=_column([r.repetition_penalty for r in requests], rows, 1.0),
        presence=_column([r.presence_penalty for r in requests], rows, 0.0),
        frequency=_column([r.frequency_penalty for r in requests], rows, 0.0),
        fresh=_column(fresh, rows, 0.0) if any(fresh) else None,
    )


def _within(values: Mapping[int, V], vocabulary: int) -> dict[int, V]:
    """Without tokens that have no logit: MLX's scatter trusts its indices, and writes beyond the array."""
    return {token: value for token, value in values.items() if token < vocabulary}


def _bias(draws: Sequence[Draw], vocabulary: int, rows: int) -> BiasParameters:
    biases = [_within(draw.request.logit_bias or {}, vocabulary) for draw in draws]
    width = _power(max(map(len, biases)))
    return BiasParameters(
        ids=_ragged([list(bias) for bias in biases], rows, width, np.int32),
        values=_ragged([list(bias.values()) for bias in biases], rows, width, np.float32),
    )


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


def _column(values: Sequence[float], rows: int, padding: float, dtype: DTypeLike = np.float32) -> mx.array:
    made = np.full((rows, 1), padding, dtype=dtype)
    made[: len(values), 0] = values
    return mx.array(made)


def _ragged(values: Sequence[Sequence[float]], rows: int, width: int, dtype: DTypeLike) -> mx.array:
    made = np.zeros((rows, width), dtype=dtype)
    for row, line in enumerate(values):
        made[row, : len(line)] = line
    return mx.array(made)
