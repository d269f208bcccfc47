"""What is hard for `sample`: ties, edges, numbers that are none, every filter alone and together, any vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.kernel import Case
from kernels.sample.arguments import Penalties, SampleInput
from kernels.sample.cases import some_penalties
from kernels.sample.reference import scored
from kernels.sample.rule import Floats, Setting

#: Numbers of a draw: the first token, the middle, the last except for rounding, the largest float32 below 1.
UNIFORMS = (0.0, 0.25, 0.5, 0.999999, 1.0 - 2.0**-24)
#: The smallest, one more or less than whole words, chunks and blocks, and what models have.
VOCABULARIES = (2, 3, 31, 33, 511, 513, 1300, 4097, 9000)
LARGE = (151_936, 262_144, 262_208, 300_001)

NOTHING, INFINITE = float("nan"), float("inf")


def settings(vocabulary: int) -> Iterator[Setting]:
    """Each filter alone, all together."""
    yield Setting()
    yield Setting(greedy=True)
    yield from (Setting(temperature=t) for t in (1e-6, 0.7, 100.0))
    yield from (Setting(top_k=k) for k in (1, 2, 50, vocabulary - 1, vocabulary, vocabulary + 5))
    yield from (Setting(top_p=p) for p in (0.0, 1e-7, 0.5, 0.95, 0.99999, 1.0 - 2.0**-24))
    yield from (Setting(temperature=0.8, top_p=p) for p in (0.3, 0.9, 0.999))
    yield from (Setting(min_p=p) for p in (1e-30, 1e-6, 0.1, 1.0))
    yield from (
        Setting(0.8, k, p, m) for k, p, m in ((50, 0.95, 0.0), (2000, 0.99, 0.01), (3, 0.6, 0.2), (1100, 0.5, 0))
    )


def broken_settings() -> Iterator[Setting]:
    """Parameters that are no numbers, or out of range."""
    yield from (Setting(temperature=t) for t in (NOTHING, INFINITE, 0.0, -1.0, 1e-42))
    yield from (Setting(top_p=p) for p in (NOTHING, INFINITE, -INFINITE, -1.0, 2.0))
    yield from (Setting(min_p=p) for p in (NOTHING, INFINITE, -INFINITE, -1.0, 2.0))
    yield from (Setting(uniform=u) for u in (NOTHING, INFINITE, -INFINITE, -1.0, 1.0, 2.0))
    yield from (Setting(top_k=k, top_p=0.9) for k in (-1, -(2**31), 2**31 - 1))


def patterns(random: np.random.Generator, vocabulary: int) -> Iterator[tuple[str, Floats]]:
    """Rows of logits, float32."""
    normal = random.standard_normal(vocabulary).astype(np.float32)
    where = random.random(vocabulary)
    yield "normal", normal * 3
    yield "flat", normal * np.float32(0.02)
    yield "steep", normal * 40
    yield "equal", np.full(vocabulary, 3.7, np.float32)
    yield "equal, just below the edge of a bin", np.full(vocabulary, -1e-6, np.float32)
    yield "near ties", np.float32(5.0) + np.float32(2.0**-21) * random.integers(0, 4, vocabulary).astype(np.float32)
    yield "near ties around zero", normal * np.float32(1e-9)
    yield "zeros of both signs", np.where(where < 0.5, np.float32(0.0), np.float32(-0.0))
    yield "few levels", random.integers(-3, 4, vocabulary).astype(np.float32)
    yield "one token with all the mass", np.where(np.arange(vocabulary) == vocabulary // 2, 100.0, normal)
    yield "one token and equal ones", np.where(np.arange(vocabulary) == vocabulary - 1, 14.0, 0.0)
    yield "each half as likely as the one before", -np.log(2.0) * random.permutation(vocabulary).clip(0, 200)
    yield "far apart", np.where(where < 0.3, normal, -40.0 + normal)
    yield "beyond a bin's reach", normal * np.float32(1e7)
    yield "some NaN", np.where(where < 0.2, NOTHING, normal)
    yield "most -inf", np.where(where < 0.9, -INFINITE, normal)
    yield "some +inf", np.where(where < 0.01, INFINITE, normal)
    yield "NaN and both infinities", np.choose(random.integers(0, 4, vocabulary), [NOTHING, INFINITE, -INFINITE, 1.0])
    yield "only NaN", np.full(vocabulary, NOTHING)
    yield "only -inf", np.full(vocabulary, -INFINITE)
    yield "only +inf", np.full(vocabulary, INFINITE)


def edges(scores: Floats) -> Iterator[Setting]:
    """`top_p` at sums of the sorted distribution: one unit in the last place below, at and above."""
    if not np.isfinite(scores).all():
        return
    weights = np.exp(np.sort(scores.astype(np.float64))[::-1] - float(scores.max()))
    sums = np.cumsum(weights) / weights.sum()
    for share in (0.05, 0.5, 0.9, 0.99, 0.9999):
        at = np.float32(sums[min(int(np.searchsorted(sums, share)), len(sums) - 1)])
        for top_p in (np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(2))):
            yield Setting(top_p=float(top_p))


def call(
    logits: Any,
    rows: Sequence[Setting],
    dtype: mx.Dtype,
    penalties: Penalties | None = None,
    allowed: mx.array | None = None,
) -> SampleInput:
    """The kernel's arguments: `logits` (vocabulary,) of every row, or (rows, vocabulary)."""
    array = mx.array(np.asarray(logits, np.float32)).astype(dtype)
    array = mx.broadcast_to(array, (len(rows), array.shape[-1]))
    kinds = (np.float32, np.int32, np.float32, np.float32, np.float32, np.bool_)
    temperature, top_k, top_p, min_p, uniform, greedy = (
        mx.array(np.array(values, kind)[:, None]) for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)
    )
    return SampleInput(mx.contiguous(array), temperature, top_k, top_p, min_p, uniform, greedy, penalties, allowed)


def hard(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    """Every pattern with every setting over every vocabulary; of large ones a few settings each, in turn."""
    for vocabulary in VOCABULARIES:
        yield from of_vocabulary(dtype, random, vocabulary)
    for vocabulary in LARGE:
        yield from of_vocabulary(dtype, random, vocabulary, step=5)


def of_vocabulary(dtype: mx.Dtype, random: np.random.Generator, vocabulary: int, step: int = 1) -> Iterable[Case]:
    """Every pattern over one of them, with every `step`th setting."""
    for turn, (name, logits) in enumerate(patterns(random, vocabulary)):
        rows = _rows(logits, dtype)[turn % step :: step]
        yield Case(f"{vocabulary}, {name}", call(logits, rows, dtype), vocabulary in LARGE)
    yield from _adjusted(dtype, random, vocabulary, step)


def _rows(logits: Floats, dtype: mx.Dtype) -> list[Setting]:
    rounded = np.array(mx.array(np.asarray(logits, np.float32)).astype(dtype).astype(mx.float32))
    chosen = [*settings(len(logits)), *edges(rounded)]
    drawn = [row._replace(uniform=uniform) for row, uniform in zip(chosen, cycle(UNIFORMS), strict=False)]
    return [*drawn, *broken_settings()]


def _adjusted(dtype: mx.Dtype, random: np.random.Generator, vocabulary: int, step: int) -> Iterable[Case]:
    """Penalties and a grammar, alone and together. The draws go to tokens that were penalised: with a hundred thousand
    others a wrong penalty shows nowhere else."""
    logits = random.standard_normal(vocabulary).astype(np.float32) * 3
    rows = _rows(logits, dtype)[::step]
    penalties = some_penalties(random, len(rows), vocabulary)
    words = random.integers(0, 2**32, (len(rows), -(-vocabulary // 32)), dtype=np.uint32)
    words[0] = 0  # nothing is allowed
    words[1] = 0
    words[1, 0] = 2  # one token is
    allowed, large = mx.array(words), vocabulary in LARGE
    for label, given, mask in (
        ("penalties", penalties, None),
        ("grammar", None, allowed),
        ("penalties and grammar", penalties, allowed),
    ):
        arguments = call(logits, rows, dtype, given, mask)
        yield Case(f"{vocabulary}, {label}", arguments if given is None else _at_penalised(arguments, given), large)


def _at_penalised(given: SampleInput, penalties: Penalties) -> SampleInput:
    """With the rows' numbers in the middle of a penalised token's stretch, as if no filter were there."""
    with mx.stream(mx.cpu):
        scores, _ = scored(given.logits.astype(mx.float32), given.temperature, penalties, given.allowed)
    score, ids = np.array(scores, np.float64), np.array(penalties.seen_ids)
    weights = np.exp(score - score.max(axis=1, keepdims=True))
    to = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    token = np.take_along_axis(ids, np.take_along_axis(score, ids, axis=1).argmax(axis=1)[:, None], axis=1)
    middle = np.take_along_axis(to - weights / weights.sum(axis=1, keepdims=True) / 2, token, axis=1)
    return given._replace(uniform=mx.array(middle.astype(np.float32)))
