"""Shapes of `rope` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device
from kernels.rope.arguments import RopeInput


def _periods(dim: int, base: float = 1e6) -> mx.array:
    return mx.array(base ** (np.arange(0, dim, 2) / dim), mx.float32)


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for rows, heads, kv_heads, dim, norm in (
        (1, 1, 1, 2, False),
        (3, 14, 2, 64, False),
        (2, 4, 4, 128, True),
        (2, 3, 1, 80, True),
    ):
        q, k = normal(random, (rows, heads, dim), dtype), normal(random, (rows, kv_heads, dim), dtype)
        offset = mx.array(random.integers(0, 2000, rows), mx.int32)
        q_weight, k_weight = (normal(random, (dim,), dtype) if norm else None for _ in range(2))
        label = f"{rows} rows, {heads} + {kv_heads} heads of {dim}{', norms' if norm else ''}"
        yield Case(label, RopeInput(q, k, offset, _periods(dim), q_weight, k_weight))
    # Heads so small that eps counts.
    q, k = normal(random, (2, 2, 64), dtype, 1e-3), normal(random, (2, 1, 64), dtype, 1e-3)
    q_weight, k_weight = (normal(random, (64,), dtype) for _ in range(2))
    yield Case("2 rows, small, norms", RopeInput(q, k, mx.array([0, 700], mx.int32), _periods(64), q_weight, k_weight))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows, norm in ((1, False), (32, False), (32, True)):
        q, k = on_device((rows, 14, 64), dtype), on_device((rows, 2, 64), dtype)
        weight = mx.ones(64, dtype) if norm else None
        arguments = RopeInput(q, k, mx.full((rows,), 500, mx.int32), _periods(64), weight, weight)
        label = f"{rows} rows, 14 + 2 heads of 64{', norms' if norm else ''}"
        yield Timing(
            label,
            arguments,
            2 * (q.nbytes + k.nbytes),
            lambda given, made: (made[0][:, :, 0], made[1][:, :, 0], *given[2:]),
        )
