"""Shapes of `norm_project` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for rows, width, outputs, gated in (
        *((1, 8, 1, True), (1, 896, 20, True), (2, 264, 9, True), (3, 40, 33, True), (4, 512, 8, True)),
        *((1, 8, 1, False), (1, 896, 20, False), (3, 264, 17, False)),
    ):
        for biased in (False,) if gated else (False, True):
            x, r = (normal(random, (rows, width), dtype, 2.0) for _ in range(2))
            matrix = normal(random, ((1 + gated) * outputs, width), dtype, width**-0.5)
            bias = normal(random, (outputs,), dtype) if biased else None
            how = "gated" if gated else "with a bias" if biased else "alone"
            weight = normal(random, (width,), dtype)
            yield Case(f"{rows} × {width} → {outputs}, {how}", (x, r, weight, matrix, bias, 1e-6, gated))
    # Rows so small that eps counts; and so many outputs that a simdgroup makes two, and as many as it may.
    x, r = (normal(random, (2, 64), dtype, 1e-3) for _ in range(2))
    weight = normal(random, (64,), dtype)
    yield Case("2 × 64 → 16, small", (x, r, weight, normal(random, (32, 64), dtype), None, 1e-6, True))
    for outputs, gated in ((8201, True), (16401, False)):
        matrix = normal(random, ((1 + gated) * outputs, 16), dtype)
        given = (x[:1, :16], r[:1, :16], weight[:16], matrix, None, 1e-6, gated)
        yield Case(f"1 × 16 → {outputs:,}", given, large=True)


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows, width, outputs, gated in (
        *((1, 896, 1152, False), (4, 896, 1152, False), (1, 896, 4864, True), (4, 896, 4864, True)),
        (1, 1536, 8960, True),
    ):
        x, r = (on_device((rows, width), dtype) for _ in range(2))
        matrix = on_device(((1 + gated) * outputs, width), dtype, width**-0.5)
        given = (x, r, mx.ones(width, dtype), matrix, None, 1e-6, gated)
        yield Timing(
            f"{rows} × {width} → {outputs}{', gated' * gated}", given, int(matrix.nbytes),
            lambda given, made: (made[0], made[1][:, : given[0].shape[1]], *given[2:]),
        )  # fmt: skip
