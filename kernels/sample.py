"""From logits to tokens without a sort: penalties, grammar, temperature, top-k, top-p, min-p and the draw, a row each.

Scores are logits after penalties and grammar, over the temperature. Kept are those that reach the smallest score which
top-k, then top-p on what top-k left, then min-p keep: tokens of equal score are cut or kept together. The draw takes
the first token, in the order of the vocabulary, at which the sum of kept probabilities goes beyond the row's number.

How it comes without a sort: the first launch makes a histogram of the scores in bins of 1/8, with counts and masses;
the second finds the bin in which top-k and top-p cut, and sorts that bin alone: a radix select of two quantities.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from kernels.body import Body, Template
from kernels.kernel import DTYPES, Arrays, Case, Kernel, Timing, normal, on_device

_CHUNK, _BLOCK, _PICK_THREADS = 512, 4096, 512
_MOST = 1 << 20
_ROW = ("temperature", "top_k", "top_p", "min_p", "uniform", "greedy")
_PENALTIES = ("seen_ids", "seen", "counts", "last", "repetition", "presence", "frequency")
_SCAN = Body(
    "sample_scan",
    ("logits", "temperature", "top_k", "top_p", "greedy", *_PENALTIES, "allowed"),
    ("stats", "histogram", "scores"),
    ("sample.h",),
)
_PICK = Body(
    "sample_pick",
    ("logits", "scores", "stats", "histogram", *_ROW),
    ("chosen", "raw", "logprob", "probability"),
    ("common.h", "sample.h", "sample_pick.h"),
)
#: What a score less than this under the best one weighs is not drawn: e^−87 is the last normal float32.
FAINTEST = -87.0


class Penalties(NamedTuple):
    """Tokens so far. A row's entries (rows, any) may be padded with `seen` 0; entries of one token are added up.

    A token counts as seen (for `repetition`: Keskar et al., 2019) if any entry of it has `seen` above 0, and its
    `counts` are for `presence` and `frequency` (OpenAI's). `last`, int32 (rows,), is one more entry that counts 1;
    below 0: none. The three strengths are float32 (rows,), 1, 0 and 0 where a row has none.
    """

    seen_ids: mx.array
    seen: mx.array
    counts: mx.array
    last: mx.array
    repetition: mx.array
    presence: mx.array
    frequency: mx.array


class Sampled(NamedTuple):
    """Of each row the token (int32), its raw logit and log-probability, and its probability among those kept."""

    token: mx.array
    logit: mx.array
    logprob: mx.array
    probability: mx.array


def sample(
    logits: mx.array,
    *,
    temperature: mx.array,
    top_k: mx.array,
    top_p: mx.array,
    min_p: mx.array,
    uniform: mx.array,
    greedy: mx.array,
    penalties: Penalties | None = None,
    allowed: mx.array | None = None,
) -> Sampled:
    """One token a row of `logits` (rows, vocabulary).

    float32, (rows,) or (rows, 1): `temperature` above 0, `top_p` (1: off), `min_p` (0: off), `uniform` in [0, 1).
    `top_k`: int32, 0 or the vocabulary: off. `greedy`: bool; such a row takes the first of its best tokens.
    `allowed`: int32 or uint32 (rows, vocabulary / 32), a bit for each token that a grammar allows.
    """
    return Sampled(*KERNEL(logits, temperature, top_k, top_p, min_p, uniform, greedy, penalties, allowed))


# --- The formula in MLX's own operations: a sort.


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
        logits = logits - (presence * (counts > 0) + frequency * counts)
    if allowed is not None:
        words = mx.repeat(allowed.astype(mx.uint32), 32, axis=-1)[:, :vocabulary]
        bits = mx.right_shift(words, mx.arange(vocabulary, dtype=mx.uint32)[None] % 32) & 1
        logits = mx.where(bits == 1, logits, -mx.inf)
    return logits


def _reference(
    logits: mx.array,
    temperature: mx.array,
    top_k: mx.array,
    top_p: mx.array,
    min_p: mx.array,
    uniform: mx.array,
    greedy: mx.array,
    penalties: Penalties | None,
    allowed: mx.array | None,
) -> Arrays:
    rows, vocabulary = logits.shape
    temperature, top_k, top_p, min_p, uniform, greedy = (
        array.reshape(rows, 1) for array in (temperature, top_k, top_p, min_p, uniform, greedy)
    )
    logits = logits.astype(mx.float32)
    scores = adjusted(logits, penalties, allowed) / temperature
    ranked = mx.sort(scores, axis=-1)[:, ::-1]
    best = ranked[:, :1]
    kth = mx.take_along_axis(ranked, mx.where(top_k == 0, vocabulary, mx.minimum(top_k, vocabulary)) - 1, axis=-1)
    weights = mx.where(ranked >= kth, mx.exp(ranked - best), 0.0)
    cumulative = mx.cumsum(weights, axis=-1)
    inside = mx.sum(cumulative - weights < top_p * cumulative[:, -1:], axis=-1, keepdims=True)
    nucleus = mx.take_along_axis(ranked, mx.maximum(inside, 1) - 1, axis=-1)
    lowest = mx.maximum(kth, mx.maximum(best + FAINTEST, best + mx.log(min_p)))
    lowest = mx.where(top_p < 1.0, mx.maximum(lowest, nucleus), lowest)
    kept = mx.where(scores >= lowest, mx.exp(scores - best), 0.0)
    cumulative = mx.cumsum(kept, axis=-1)
    total = cumulative[:, -1:]
    reached = (cumulative > uniform * total) & (kept > 0)
    drawn = mx.where(mx.any(reached, axis=-1), mx.argmax(reached, axis=-1), mx.argmax(scores, axis=-1))
    likely = (mx.take_along_axis(kept, drawn[:, None], axis=-1) / total)[:, 0]
    chosen = mx.where(greedy[:, 0], mx.argmax(scores, axis=-1), drawn)
    raw = mx.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    probability = mx.where(greedy[:, 0], 1.0, likely)
    return [chosen.astype(mx.int32), raw, raw - mx.logsumexp(logits, axis=-1), probability]


# --- The kernel.


def _refuse(
    logits: mx.array,
    temperature: mx.array,
    top_k: mx.array,
    top_p: mx.array,
    min_p: mx.array,
    uniform: mx.array,
    greedy: mx.array,
    penalties: Penalties | None,
    allowed: mx.array | None,
) -> str | None:
    if logits.dtype not in DTYPES:
        return f"logits of dtype {logits.dtype}"
    if logits.ndim != 2 or not 1 < logits.shape[1] <= _MOST:
        return f"logits of shape {logits.shape}"
    if any(array.dtype != mx.float32 for array in (temperature, top_p, min_p, uniform)):
        return "parameters that are not float32"
    if top_k.dtype != mx.int32 or greedy.dtype != mx.bool_:
        return "top_k that is not int32, or greedy that is not bool"
    if penalties is not None and penalties.last.dtype != mx.int32:
        return "a last token that is not int32"
    if allowed is not None and allowed.shape[1] * 32 < logits.shape[1]:
        return "a grammar of fewer tokens than the logits"
    return None


def _launch(
    logits: mx.array,
    temperature: mx.array,
    top_k: mx.array,
    top_p: mx.array,
    min_p: mx.array,
    uniform: mx.array,
    greedy: mx.array,
    penalties: Penalties | None,
    allowed: mx.array | None,
) -> Arrays:
    rows, vocabulary = logits.shape
    chunks, blocks = -(-vocabulary // _CHUNK), -(-vocabulary // _BLOCK)
    adjusted = penalties is not None or allowed is not None
    sizes: Template = [
        ("T", logits.dtype),
        ("V", vocabulary),
        ("CHUNKS", chunks),
        ("BLOCKS", blocks),
        ("ADJUSTED", adjusted),
    ]
    ids = top_k if penalties is None else penalties.seen_ids
    stats, histogram, scores = _SCAN.launch(
        (
            *(logits, temperature, top_k, top_p, greedy),
            *((top_k, temperature, temperature, top_k, *[temperature] * 3) if penalties is None else penalties),
            top_k if allowed is None else allowed,
        ),
        template=[
            *sizes,
            *(("WIDTH", ids.size // rows), ("PENALISED", penalties is not None), ("MASKED", allowed is not None)),
            *(("WORDS", 1 if allowed is None else allowed.shape[1]), ("TALLY", 1 if penalties is None else _BLOCK)),
        ],
        groups=(rows, blocks),
        threads=256,
        outputs=[
            ((rows, chunks, 4), mx.float32),
            ((rows, blocks, 2, 256), mx.uint32),
            ((rows, vocabulary) if adjusted else (1,), mx.float32),
        ],
        kernel="sample",
    )
    return _PICK.launch(
        (logits, scores, stats, histogram, temperature, top_k, top_p, min_p, uniform, greedy),
        template=sizes,
        groups=(rows, 1),
        threads=_PICK_THREADS,
        outputs=[((rows,), mx.int32), *[((rows,), mx.float32)] * 3],
        kernel="sample",
    )


# --- Shapes to check and to measure.


def _arguments(
    random: np.random.Generator,
    logits: mx.array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    penalties: Penalties | None = None,
    allowed: mx.array | None = None,
) -> tuple[Any, ...]:
    """The same parameters for every row, with a uniform number each."""
    rows = logits.shape[0]
    floats = [mx.full((rows, 1), value) for value in (temperature, top_p, min_p)]
    uniform = mx.array(random.random((rows, 1)).astype(np.float32))
    parameters = (floats[0], mx.full((rows, 1), top_k, mx.int32), *floats[1:], uniform, mx.full((rows, 1), greedy))
    return (logits, *parameters, penalties, allowed)


def _penalties(random: np.random.Generator, rows: int, vocabulary: int) -> Penalties:
    shape = (rows, 24)
    return Penalties(
        mx.array(random.integers(0, vocabulary, shape), mx.int32),
        mx.array(random.integers(0, 2, shape), mx.float32),
        mx.array(random.integers(0, 4, shape), mx.float32),
        mx.array(np.where(np.arange(rows) % 2, -1, random.integers(0, vocabulary, rows)), mx.int32),
        mx.array(random.uniform(1.0, 2.0, (rows, 1)), mx.float32),
        mx.array(random.uniform(0.0, 1.0, (rows, 1)), mx.float32),
        mx.array(random.uniform(0.0, 1.0, (rows, 1)), mx.float32),
    )


def _cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    def logits(rows: int, vocabulary: int, scale: float = 3.0) -> mx.array:
        return normal(random, (rows, vocabulary), dtype, scale)

    def case(label: str, given: mx.array, *, large: bool = False, **parameters: Any) -> Case:
        return Case(f"{given.shape[0]} × {given.shape[1]}, {label}", _arguments(random, given, **parameters), large)

    def penalised(label: str, **parameters: Any) -> Case:
        return case(label, logits(3, 1500), penalties=_penalties(random, 3, 1500), **parameters)

    allowed = mx.array(random.integers(0, 2**32, (3, -(-1500 // 32)), dtype=np.uint32))
    yield case("top-p 0.9 of flat scores", logits(1, 5000, 0.02), top_p=0.9)
    yield penalised("penalties and a grammar", allowed=allowed, top_p=0.8)
    yield case("top-k 50, top-p 0.95", logits(3, 5000), top_k=50, top_p=0.95, temperature=0.8)
    yield case("temperature alone", logits(2, 5000), temperature=0.7)
    yield case("top-k 2000, top-p 0.7 of equal scores", mx.zeros((1, 5000), dtype), top_k=2000, top_p=0.7)
    yield case("top-k 1500, more than a window", logits(1, 5000), top_k=1500, top_p=0.99)
    yield case("min-p 0.1", logits(2, 5000), min_p=0.1, temperature=1.5)
    yield case("greedy", logits(2, 5000), greedy=True)
    yield case("top-k 1", logits(2, 513), top_k=1)
    yield case("two tokens", logits(2, 2))
    yield penalised("penalties", top_k=20)
    yield case("top-k 50, top-p 0.95", logits(2, 151_936), top_k=50, top_p=0.95, large=True)
    yield case("temperature alone", logits(1, 151_936), large=True)


def _error(arguments: tuple[Any, ...], results: Arrays) -> float:
    """How wrong `results` are, from 0: how far a row's uniform number lies outside of the chosen token's stretch of the
    kept distribution, computed in float64, or what its numbers differ by. A token that is not kept: infinity."""
    logits, temperature, top_k, top_p, min_p, uniform, greedy, penalties, allowed = arguments
    raw = np.array(logits.astype(mx.float32), np.float64)
    scores = np.array(adjusted(logits.astype(mx.float32), penalties, allowed) / temperature.reshape(-1, 1), np.float64)
    token, logit, logprob, probability = (np.array(array, np.float64) for array in results)
    if not all(np.isfinite(array).all() for array in (token, logit, logprob, probability)):
        return float("inf")
    worst = 0.0
    for row, score in enumerate(scores):
        picked = int(token[row])
        if not 0 <= picked < len(score):
            return float("inf")
        settings = [np.array(array).reshape(-1)[row] for array in (top_k, top_p, min_p, uniform, greedy)]
        low, high = _stretch(score, picked, *settings)
        inside = max(0.0, low - float(settings[3]), float(settings[3]) - high) if not settings[4] else 0.0
        share = 1.0 if settings[4] else high - low
        peak = raw[row].max()
        expected = raw[row, picked] - peak - np.log(np.exp(raw[row] - peak).sum())
        errors = (
            inside,
            abs(share - probability[row]),
            abs(logit[row] - raw[row, picked]),
            abs(expected - logprob[row]),
        )
        worst = max(worst, *errors)
    return float(worst)


def _stretch(
    score: np.ndarray, picked: int, top_k: int, top_p: float, min_p: float, _: float, greedy: bool
) -> tuple[float, float]:
    """Where the token lies in the cumulative distribution; an empty one at infinity if it is not kept."""
    if greedy:
        return (0.0, 1.0) if picked == int(np.argmax(score)) else (np.inf, np.inf)
    ranked = np.sort(score)[::-1]
    lowest = max(ranked[0] + FAINTEST, ranked[0] + np.log(min_p) if min_p else -np.inf)
    if 0 < top_k < len(ranked):
        lowest = max(lowest, ranked[top_k - 1])
    weights = np.where(
        ranked >= (ranked[top_k - 1] if 0 < top_k < len(ranked) else -np.inf), np.exp(ranked - ranked[0]), 0
    )
    if top_p < 1.0:
        before = np.cumsum(weights) - weights
        # Of sums in float32 this is decided only so far: the nucleus may be a token smaller or larger.
        lowest = max(lowest, ranked[max(1, int((before < float(top_p) * weights.sum()).sum())) - 1])
    kept = np.where(score >= lowest, np.exp(score - ranked[0]), 0.0)
    if kept[picked] == 0:
        return np.inf, np.inf
    to = np.cumsum(kept) / kept.sum()
    return float(to[picked] - kept[picked] / kept.sum()), float(to[picked])


def _timings(dtype: mx.Dtype) -> Iterable[Timing]:
    random = np.random.default_rng(0)
    ways: dict[str, dict[str, Any]] = {
        "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
        "top-p 0.95": {"top_p": 0.95},
        "temperature alone": {},
    }
    for rows in (32, 1):
        logits = on_device((rows, 151_936), dtype, 3.0)
        for label, parameters in ways.items():
            arguments = _arguments(random, logits, **parameters)
            yield Timing(f"{rows} × 151936, {label}", arguments, logits.nbytes, _reference)


KERNEL = Kernel(
    name="sample",
    reason="a sort of the vocabulary moves it some ten times and then takes eight more launches; this reads it once",
    bodies=(_SCAN, _PICK),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=_cases,
    timings=_timings,
    error=_error,
    tolerances=dict.fromkeys(DTYPES, 2e-05),
)
