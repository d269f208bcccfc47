"""From logits to tokens, for a batch in which every row has its own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from stoker.contract import GenerateRequest

#: Below this a temperature would only overflow float32: it is as good as greedy.
COLDEST = 1e-6


@dataclass(frozen=True)
class Draw:
    """How one row is sampled. `position` is the index of the token to be drawn, from 0."""

    request: GenerateRequest
    position: int

    @property
    def greedy(self) -> bool:
        return self.request.temperature == 0.0

    @property
    def uniform(self) -> float:
        """A number in [0, 1) that depends on (seed, position) alone.

        Philox is counter-based (Salmon et al. 2011): the same request draws the same numbers alone, in any batch, on
        any back-end, and when another worker goes on with it.
        """
        bits = np.random.Philox(key=self.request.seed, counter=self.position)
        return float(np.random.Generator(bits).random())


@dataclass(frozen=True)
class Pick:
    token_id: int
    #: The raw model's.
    logit: float
    logprob: float
    #: Of the distribution sampled from.
    probability: float


def sample(logits: mx.array, draws: Sequence[Draw]) -> list[Pick]:
    """Choose one token a row. `logits`: (rows, vocabulary) float32."""
    if all(draw.greedy for draw in draws):
        chosen, probability = mx.argmax(logits, axis=-1), mx.ones(len(draws))
    else:
        chosen, probability = _draw(logits, draws)
    raw = mx.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    logprob = raw - mx.logsumexp(logits, axis=-1)
    mx.eval(chosen, raw, logprob, probability)
    columns = zip(*map(np.array, (chosen, raw, logprob, probability)), strict=True)
    return [Pick(int(token), float(x), float(log), float(p)) for token, x, log, p in columns]


def _draw(logits: mx.array, draws: Sequence[Draw]) -> tuple[mx.array, mx.array]:
    """Inverse-CDF sampling over the sorted distribution; greedy rows keep only the best token.

    Order as in transformers: temperature, then top-k, then top-p on what top-k left, renormalised.
    """
    vocabulary = logits.shape[-1]
    temperature = _column([1.0 if draw.greedy else max(COLDEST, draw.request.temperature) for draw in draws])
    top_k = _column([1 if draw.greedy else draw.request.top_k or vocabulary for draw in draws])
    top_p = _column([draw.request.top_p for draw in draws])
    uniform = _column([draw.uniform for draw in draws])

    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    ranked = (ranked - ranked[:, :1]) / temperature
    ranked = mx.where(mx.arange(vocabulary)[None] < top_k, ranked, -mx.inf)
    probability = mx.softmax(ranked, axis=-1)
    before = mx.cumsum(probability, axis=-1) - probability
    probability = mx.where(before < top_p, probability, 0.0)
    cumulative = mx.cumsum(probability, axis=-1)
    total = cumulative[:, -1:]
    # Rounding may leave u·total beyond the last kept token: never step past it.
    kept = mx.sum(probability > 0, axis=-1) - 1
    rank = mx.minimum(mx.sum(cumulative <= uniform * total, axis=-1), kept)[:, None]
    chosen = mx.take_along_axis(order, rank, axis=-1)[:, 0]
    return chosen, (mx.take_along_axis(probability, rank, axis=-1) / total)[:, 0]


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(list(values), dtype=mx.float32)[:, None]
