"""Shapes of `mean_pool` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device
from kernels.mean_pool.arguments import MeanPoolInput


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for texts, tokens, width, normalize in (
        (1, 1, 33, True),
        (3, 7, 384, True),
        (2, 19, 768, False),
        (2, 40, 100, True),
    ):
        x, r = (normal(random, (texts, tokens, width), dtype, 2.0) for _ in range(2))
        w, b = (normal(random, (width,), dtype) for _ in range(2))
        lengths = mx.array(random.integers(1, tokens + 1, texts).astype(np.int32))
        label = f"{texts} × {tokens} × {width}{', L2' if normalize else ''}"
        yield Case(label, MeanPoolInput(x, r, w, b, lengths, 1e-12, normalize))
    # Rows so flat that eps counts; vectors of next to nothing, whose norm is below its floor as a mean, not as a sum.
    x = normal(random, (2, 40, 64), dtype, 1e-3)
    lengths, w, b = mx.array([40, 7], mx.int32), normal(random, (64,), dtype), normal(random, (64,), dtype)
    yield Case("2 × 40 × 64, flat", MeanPoolInput(x, mx.zeros_like(x), w, b, lengths, 1e-5, False))
    nothing = normal(random, (64,), dtype, 1e-14)
    yield Case("2 × 40 × 64, next to nothing, L2", MeanPoolInput(x, x, mx.zeros_like(w), nothing, lengths, 1e-5, True))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for texts, tokens in ((1, 32), (100, 32), (100, 128)):
        x, r = (on_device((texts, tokens, 384), dtype) for _ in range(2))
        lengths = mx.full((texts,), tokens, mx.int32)
        arguments = MeanPoolInput(x, r, mx.ones(384, dtype), mx.zeros(384, dtype), lengths, 1e-12, True, False)
        yield Timing(f"{texts} × {tokens} × 384", arguments, 2 * x.nbytes + texts * 384 * 4)
