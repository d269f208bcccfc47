"""What `sample` may return, in float64: the rule for everything that float32 rounds.

Exact are the scores (float32, as given to the draw), top-k, and that equal scores are cut or kept together. Rounded:

- Sums of weights, to `NUCLEUS` of the whole. So top-p may cut where it would for a `top_p` that much smaller or larger:
  what lies above the smallest score kept weighs less than top_p + NUCLEUS of all, and with it at least top_p − NUCLEUS.
- The edges of min-p and of the faintest score, best + log(min_p) and best − 87, to two units in the last place.
- The draw: the token's stretch of the cumulative distribution lies within the tolerance of `uniform`.
- The probability, relatively to itself, and the log-probability: within the tolerance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kernels.kernel import Arrays
from kernels.sample.arguments import SampleInput
from kernels.sample.reference import FAINTEST, SCORE_LIMIT, finite, scored

Floats = NDArray[np.floating[Any]]

#: By how much of all a sum of weights may be off where top-p cuts.
NUCLEUS = 1e-5


class Setting(NamedTuple):
    """The parameters of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5
    greedy: bool = False


class Stretch(NamedTuple):
    """Where a token lies in the cumulative distribution, from and to, and what it weighs there."""

    low: float
    high: float
    share: float


def error(arguments: tuple[Any, ...], results: Arrays) -> float:
    """How wrong `results` are: the worst of all rows; infinite for a token that is not kept."""
    return max(errors(arguments, results))


def errors(arguments: tuple[Any, ...], results: Arrays) -> list[float]:
    """The same of each row."""
    given = SampleInput(*arguments)
    rows = given.logits.shape[0]
    with mx.stream(mx.cpu):
        logits = given.logits.astype(mx.float32)
        scores, warm = scored(logits, given.temperature.reshape(rows, 1), given.penalties, given.allowed)
        raw, clean, score = np.array(logits), np.array(finite(logits), np.float64), np.array(scores)
    parameters = [np.array(array).reshape(-1).tolist() for array in given[1:6]]
    cold = (np.array(given.greedy) | ~np.array(warm)).reshape(-1).tolist()
    settings = [Setting(*row) for row in zip(*parameters, cold, strict=True)]
    made = zip(*(np.array(array).tolist() for array in results), strict=True)
    return [
        max(
            _error_of_draw(score[row], settings[row], token, probability),
            _error_of_raw(raw[row], clean[row], token, logit, logprob),
        )
        for row, (token, logit, logprob, probability) in enumerate(made)
    ]


def _error_of_raw(raw: Floats, clean: Floats, token: int, logit: float, logprob: float) -> float:
    if not 0 <= token < len(raw) or not np.isfinite(logprob):
        return float("inf")
    peak = clean.max()
    expected = clean[token] - peak - np.log(np.exp(clean - peak).sum())
    same = np.array_equal(np.float32(logit), raw[token], equal_nan=True)
    return float(abs(expected - logprob) / max(1.0, abs(expected))) if same else float("inf")


def _error_of_draw(scores: Floats, setting: Setting, token: int, probability: float) -> float:
    """`scores`: float32, of one row."""
    if not 0 <= token < len(scores) or not np.isfinite(probability):
        return float("inf")
    best = scores.max()
    if best <= -SCORE_LIMIT:
        return 0.0 if (token, probability) == (0, 0.0) else float("inf")
    if setting.greedy:
        return abs(probability - 1.0) if token == int(np.argmax(scores)) else float("inf")
    tightest, loosest = cuts(scores, setting)
    if scores[token] < loosest or probability <= 0.0:
        return float("inf")
    ends = [_stretch(scores, cut, token) for cut in (tightest, loosest)]
    uniform = 0.0 if np.isnan(setting.uniform) else min(max(setting.uniform, 0.0), 1.0)
    outside = max(min(end.low for end in ends) - uniform, uniform - max(end.high for end in ends))
    shares = [end.share for end in ends]
    return max(0.0, outside, min(shares) / probability - 1.0, probability / max(shares) - 1.0)


def _stretch(scores: Floats, cut: float, token: int) -> Stretch:
    weights = np.exp(scores.astype(np.float64) - float(scores.max()))
    kept = np.where((scores >= cut) & (scores > -SCORE_LIMIT), weights, 0.0)
    total = kept.sum()
    to = kept[: token + 1].sum() / total
    return Stretch(float(to - kept[token] / total), float(to), float(weights[token] / total))


def cuts(scores: Floats, setting: Setting) -> tuple[float, float]:
    """The largest and the smallest score that may be the smallest one kept."""
    vocabulary, best = len(scores), scores.max()
    ranked = np.sort(scores)[::-1]
    kth = ranked[min(setting.top_k, vocabulary) - 1] if setting.top_k > 0 else ranked[-1]
    found = []
    for slack in (-1, 1):
        edges = [np.float32(best) + np.float32(FAINTEST)]
        if setting.min_p > 0.0:
            edges.append(np.float32(best) + np.log(np.float32(min(setting.min_p, 1.0))))
        lowest = max([kth, *(edge - slack * 2 * np.spacing(np.abs(edge)) for edge in edges)])
        if setting.top_p < 1.0:
            lowest = max(lowest, _nucleus(ranked, kth, setting.top_p + slack * NUCLEUS))
        found.append(float(min(lowest, best)))
    return found[0], found[1]


def _nucleus(ranked: Floats, kth: float, top_p: float) -> float:
    weights = np.where(ranked >= kth, np.exp(ranked.astype(np.float64) - float(ranked[0])), 0.0)
    cumulative = np.cumsum(weights)
    inside = int((cumulative - weights < top_p * cumulative[-1]).sum())
    return float(ranked[max(inside, 1) - 1])
