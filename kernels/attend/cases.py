"""Shapes of `attend` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    shapes = ((2, 14, 2, 64, 150, None), (3, 4, 4, 32, 40, None), (1, 8, 1, 128, 300, 50), (2, 2, 1, 16, 1, None))
    for rows, heads, kv_heads, dim, capacity, window in shapes:
        q = normal(random, (rows, heads, 1, dim), dtype)
        keys, values = (normal(random, (rows + 1, kv_heads, capacity, dim), dtype) for _ in range(2))
        offset = mx.array(random.integers(0, capacity, rows), mx.int32)
        label = f"{rows} rows of {capacity}, {heads} heads over {kv_heads} of {dim}"
        label = f"{label}, window {window}" if window else label
        yield Case(label, (q, keys, values, offset, dim**-0.5, window))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    random = np.random.default_rng(0)
    for rows, capacity in ((1, 512), (32, 512), (32, 2048)):
        q = on_device((rows, 14, 1, 64), dtype)
        keys, values = (on_device((rows, 2, capacity, 64), dtype) for _ in range(2))
        offset = mx.array(random.integers(capacity // 2, capacity, rows), mx.int32)
        read = int(np.array(offset + 1).sum()) * 2 * 64 * int(dtype.size) * 2
        arguments = (q, keys, values, offset, 0.125, None)
        label = f"{rows} rows of {capacity // 2} to {capacity}, 14 heads over 2"
        yield Timing(label, arguments, read + 2 * q.nbytes, lambda given, made: (made[0], *given[1:]))
