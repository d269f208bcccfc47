"""Shapes of `add_layer_norm` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for shape in ((1, 2), (1, 33), (6, 384), (2, 3, 1000), (3, 3072)):
        x, r = (normal(random, shape, dtype, 2.0) for _ in range(2))
        w, b = (normal(random, shape[-1:], dtype) for _ in range(2))
        yield Case(" × ".join(map(str, shape)), (x, r, w, b, 1e-5))
    # Rows so flat that eps counts.
    x = normal(random, (4, 96), dtype, 1e-3)
    w, b = (normal(random, (96,), dtype) for _ in range(2))
    yield Case("4 × 96, flat", (x, mx.zeros_like(x), w, b, 1e-5))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows in (32, 3200, 12800):
        x, r = (on_device((rows, 384), dtype) for _ in range(2))
        arguments = (x, r, mx.ones(384, dtype), mx.zeros(384, dtype), 1e-12, False)
        yield Timing(f"{rows} × 384", arguments, 3 * x.nbytes, lambda given, made: (made[0], *given[1:]))
