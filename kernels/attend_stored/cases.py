"""Shapes of `attend_stored` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from kernels import packed_kv
from kernels.attend_stored.arguments import StoredAttention
from kernels.kernel import Case, Timing, normal, on_device


class _Shape(NamedTuple):
    rows: int
    heads: int
    kv_heads: int
    dim: int
    capacity: int
    window: int | None = None
    sinks: bool = False
    bits: int = 16


_SHAPES = (
    _Shape(2, 14, 2, 64, 150),
    _Shape(3, 4, 4, 32, 40),
    _Shape(1, 8, 1, 128, 300, window=50),
    _Shape(3, 4, 1, 16, 9, window=3),
    _Shape(2, 2, 1, 16, 1),
    _Shape(3, 8, 2, 64, 33, sinks=True),
    _Shape(2, 4, 2, 16, 90, window=20, sinks=True),
    _Shape(2, 14, 2, 64, 150, sinks=True, bits=8),
    _Shape(3, 4, 1, 128, 33, window=9, bits=4),
)


def _input(shape: _Shape, dtype: mx.Dtype, random: np.random.Generator) -> StoredAttention:
    def stored() -> mx.array:
        x = normal(random, (shape.rows + 1, shape.kv_heads, shape.capacity, shape.dim), dtype)
        return x if shape.bits == 16 else packed_kv.pack(x, shape.bits)

    # From a row's first token to its last that fits.
    offset = [shape.capacity - 1, 0, *random.integers(0, shape.capacity, shape.rows)][: shape.rows]
    return StoredAttention(
        normal(random, (shape.rows, shape.heads, 1, shape.dim), dtype),
        stored(),
        stored(),
        mx.array(np.array(offset), mx.int32),
        shape.dim**-0.5,
        shape.window,
        normal(random, (shape.heads,), dtype) if shape.sinks else None,
        shape.bits,
    )


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for shape in _SHAPES:
        label = f"{shape.rows} rows of {shape.capacity}, {shape.heads} heads over {shape.kv_heads} of {shape.dim}"
        window, sinks = f"window {shape.window}" if shape.window else "", "sinks" if shape.sinks else ""
        bits = f"{shape.bits} bits" if shape.bits < 16 else ""
        yield Case(", ".join(filter(None, (label, window, sinks, bits))), _input(shape, dtype, random))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    random = np.random.default_rng(0)
    for rows, capacity, bits in ((1, 512, 16), (16, 512, 16), (16, 2048, 16), (16, 2048, 8), (16, 2048, 4)):
        keys, values = (on_device((rows, 2, capacity, 64), dtype) for _ in range(2))
        if bits < 16:
            keys, values = packed_kv.pack(keys, bits), packed_kv.pack(values, bits)
        offset = mx.array(random.integers(capacity // 2, capacity, rows), mx.int32)
        read = int(np.array(offset).sum()) * 2 * 2 * keys.shape[3] * int(keys.dtype.size)
        q = on_device((rows, 14, 1, 64), dtype)
        arguments = StoredAttention(q, keys, values, offset, 0.125, bits=bits)

        def chain(given: tuple[object, ...], made: list[mx.array]) -> tuple[object, ...]:
            return (made[0], *given[1:])

        label = f"{rows} rows of {capacity // 2} to {capacity}, 14 heads over 2{f', {bits} bits' if bits < 16 else ''}"
        yield Timing(label, arguments, read + 2 * q.nbytes, chain)
