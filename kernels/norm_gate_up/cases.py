"""Shapes of `norm_gate_up` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for rows, width, outputs in ((1, 8, 1), (1, 896, 20), (2, 264, 9), (3, 40, 33), (4, 512, 8)):
        x, r = (normal(random, (rows, width), dtype, 2.0) for _ in range(2))
        matrix = normal(random, (2 * outputs, width), dtype, width**-0.5)
        yield Case(f"{rows} × {width} → {outputs}", (x, r, normal(random, (width,), dtype), matrix, 1e-6))
    # Rows so small that eps counts; and so many outputs that a simdgroup makes two.
    x, r = (normal(random, (2, 64), dtype, 1e-3) for _ in range(2))
    weight = normal(random, (64,), dtype)
    yield Case("2 × 64 → 16, small", (x, r, weight, normal(random, (32, 64), dtype), 1e-6))
    yield Case(
        "1 × 16 → 8,201", (x[:1, :16], r[:1, :16], weight[:16], normal(random, (16402, 16), dtype), 1e-6), large=True
    )


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows, width, outputs in ((1, 896, 4864), (4, 896, 4864), (1, 1536, 8960)):
        x, r = (on_device((rows, width), dtype) for _ in range(2))
        matrix = on_device((2 * outputs, width), dtype, width**-0.5)
        yield Timing(
            f"{rows} × {width} → {outputs}", (x, r, mx.ones(width, dtype), matrix, 1e-6), int(matrix.nbytes),
            lambda given, made: (made[0], made[1][:, : given[0].shape[1]], *given[2:]),
        )  # fmt: skip
