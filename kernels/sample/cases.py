"""Shapes of `sample` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device
from kernels.sample.arguments import Penalties, SampleInput


def arguments_of(
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
) -> SampleInput:
    """The same parameters for every row, with a uniform number each."""
    rows = logits.shape[0]
    return SampleInput(
        logits,
        temperature=mx.full((rows, 1), temperature),
        top_k=mx.full((rows, 1), top_k, mx.int32),
        top_p=mx.full((rows, 1), top_p),
        min_p=mx.full((rows, 1), min_p),
        uniform=mx.array(random.random((rows, 1)).astype(np.float32)),
        greedy=mx.full((rows, 1), greedy),
        penalties=penalties,
        allowed=allowed,
    )


def some_penalties(random: np.random.Generator, rows: int, vocabulary: int) -> Penalties:
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


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    def logits(rows: int, vocabulary: int, scale: float = 3.0) -> mx.array:
        return normal(random, (rows, vocabulary), dtype, scale)

    def case(label: str, given: mx.array, *, large: bool = False, **parameters: Any) -> Case:
        return Case(f"{given.shape[0]} × {given.shape[1]}, {label}", arguments_of(random, given, **parameters), large)

    def penalised(label: str, **parameters: Any) -> Case:
        return case(label, logits(3, 1500), penalties=some_penalties(random, 3, 1500), **parameters)

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
    alone = mx.where(mx.arange(3000) == 2999, 40.0, normal(random, (1, 3000), mx.float32)).astype(dtype)
    yield case("top-k 20 beyond the bins", alone, top_k=20)
    index = np.arange(5000)
    zeros = np.where(index < 200, 2 + index / 1000, np.where(index % 2, 0.0, -0.0))  # all of them are kept, or none
    above = mx.array(zeros[None], mx.float32).astype(dtype)
    yield case("top-k 2000, top-p 0.3 of zeros below others", above, top_k=2000, top_p=0.3)
    yield case("top-k 50, top-p 0.95", logits(2, 151_936), top_k=50, top_p=0.95, large=True)
    yield case("temperature alone", logits(1, 151_936), large=True)


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    random = np.random.default_rng(0)
    ways: dict[str, dict[str, Any]] = {
        "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
        "top-p 0.95": {"top_p": 0.95},
        "temperature alone": {},
    }
    for rows in (32, 1):
        logits = on_device((rows, 151_936), dtype, 3.0)
        for label, parameters in ways.items():
            arguments = arguments_of(random, logits, **parameters)
            yield Timing(f"{rows} × 151936, {label}", arguments, logits.nbytes)
