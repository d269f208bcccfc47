"""Shapes of `add_rms_norm` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for shape in ((1, 1), (1, 33), (6, 896), (2, 3, 1000), (3, 4864)):
        x, r = (normal(random, shape, dtype, 2.0) for _ in range(2))
        yield Case(" × ".join(map(str, shape)), (x, r, normal(random, shape[-1:], dtype), 1e-6))
    # Rows so small that eps counts.
    x, r = (normal(random, (4, 96), dtype, 1e-3) for _ in range(2))
    yield Case("4 × 96, small", (x, r, normal(random, (96,), dtype), 1e-6))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows in (1, 32, 4096):
        x, r = (on_device((rows, 896), dtype) for _ in range(2))
        arguments = (x, r, mx.ones(896, dtype), 1e-6, False)
        yield Timing(f"{rows} × 896", arguments, 4 * x.nbytes, lambda given, made: (made[1], made[0], *given[2:]))
