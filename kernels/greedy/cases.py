"""Shapes of `greedy` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for rows, vocabulary in ((1, 1), (2, 33), (3, 300), (1, 20_000)):
        yield Case(f"{rows} × {vocabulary}", (normal(random, (rows, vocabulary), dtype, 4.0),))
    # Many that are equal, and some that are cut off.
    tied = mx.array(random.integers(0, 4, (3, 700)).astype(np.float32)).astype(dtype)
    yield Case("3 × 700, ties", (tied,))
    yield Case("3 × 700, cut off", (mx.where(tied > 1, -mx.inf, tied).astype(dtype),))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows in (1, 32):
        logits = on_device((rows, 151_936), dtype)
        yield Timing(f"{rows} × 151,936", (logits,), int(logits.nbytes))
