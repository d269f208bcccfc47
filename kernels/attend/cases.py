"""Shapes of `attend` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from kernels import packed_kv
from kernels.attend.arguments import AttendAdapters, AttendInput
from kernels.kernel import Case, Timing, normal, on_device
from kernels.lora.arguments import LoraSides


class _Shape(NamedTuple):
    rows: int
    heads: int
    kv_heads: int
    dim: int
    capacity: int
    #: Layers before this one in what is stored.
    before: int = 0
    window: int | None = None
    norm: bool = False
    #: Whether q, k and v are one array.
    joint: bool = True
    eps_scale: float = 1.0
    #: Which of q, k and v adapters change, their rank, and whether they are DoRA's.
    adapted: str = ""
    rank: int = 8
    dora: bool = False
    bits: int = 16
    #: Positions that all rows share; a row that has fewer shares those alone.
    shared: int = 0


_SHAPES = (
    _Shape(2, 14, 2, 64, 150, before=1),
    _Shape(3, 4, 4, 32, 40, norm=True),
    _Shape(1, 8, 1, 128, 300, window=50, joint=False),
    _Shape(2, 2, 1, 16, 1, before=2),
    _Shape(3, 4, 2, 16, 9, adapted="qkv", rank=8, before=1),
    _Shape(3, 4, 1, 16, 9, adapted="qv", rank=3, joint=False, norm=True),
    _Shape(3, 4, 2, 16, 9, adapted="k", rank=24, dora=True),
    # So many rows with adapters that a threadgroup has the heads of a group.
    _Shape(9, 4, 2, 16, 9, adapted="qkv", before=1),
    # Heads so small that eps counts.
    _Shape(2, 2, 2, 64, 9, norm=True, joint=False, eps_scale=1e-3),
    # Fewer stored than the window has room for.
    _Shape(2, 4, 2, 16, 9, window=20),
    # Packed: groups of a head each, of eight lanes; of four lanes, several a head; of two; and of a lane each.
    _Shape(2, 14, 2, 64, 150, before=1, bits=8),
    _Shape(1, 8, 1, 128, 300, window=50, joint=False, bits=4),
    _Shape(2, 2, 1, 16, 1, before=2, norm=True, bits=8),
    _Shape(9, 4, 2, 8, 90, adapted="qkv", before=1, bits=4),
    # The end of what rows share within a batch of keys, before the window, in the middle of it, and in words.
    _Shape(3, 14, 2, 64, 150, before=1, shared=70),
    _Shape(2, 8, 1, 128, 300, window=50, shared=128),
    _Shape(1, 8, 1, 128, 300, window=50, shared=270),
    _Shape(2, 14, 2, 64, 150, before=1, bits=8, shared=33),
    _Shape(2, 8, 1, 128, 300, bits=4, shared=290),
)


def _periods(dim: int, base: float = 1e6) -> mx.array:
    return mx.array(base ** (np.arange(0, dim, 2) / dim), mx.float32)


def _input(shape: _Shape, dtype: mx.Dtype, random: np.random.Generator) -> AttendInput:
    rows, heads, kv_heads, dim, capacity, before, window, norm, joint, scale = shape[:10]
    widths = (heads * dim, kv_heads * dim, kv_heads * dim)
    starts = (0, widths[0], widths[0] + widths[1]) if joint else (0, 0, 0)
    whole = normal(random, (rows, sum(widths)), dtype, scale)
    q, k, v = [whole] * 3 if joint else [normal(random, (rows, width), dtype, scale) for width in widths]
    q_weight, k_weight = (normal(random, (dim,), dtype) if norm else None for _ in range(2))

    def kept(*outer: int) -> mx.array:
        x = normal(random, (*outer, dim), dtype)
        return x if shape.bits == 16 else packed_kv.pack(x, shape.bits)

    # From none stored, by which a row sees its new token alone, to all.
    offset = np.array([capacity, 0, *random.integers(0, capacity, rows)][:rows])
    return AttendInput(
        q,
        k,
        v,
        stored=kept((before + 2) * 2 * kv_heads, rows * capacity + 3),
        fresh=kept(rows, before * 2 * kv_heads) if before else None,
        segment=_segments(rows, capacity, offset, shape.shared),
        offset=mx.array(offset, mx.int32),
        period=_periods(dim),
        q_weight=q_weight,
        k_weight=k_weight,
        starts=starts,
        heads=heads,
        kv_heads=kv_heads,
        scale=dim**-0.5,
        window=window,
        adapters=_adapters(shape, widths, dtype, random) if shape.adapted else None,
        bits=shape.bits,
    )


def _segments(rows: int, capacity: int, offset: np.ndarray, shared: int) -> mx.array:
    """Of these rows: the first one's own positions lie last, and what all share before those of all."""
    own = 3 + capacity * np.arange(rows)[::-1]
    return mx.array(np.stack([np.full(rows, 2), np.minimum(offset, shared), own + shared], axis=1), mx.int32)


def _adapters(
    shape: _Shape, widths: tuple[int, int, int], dtype: mx.Dtype, random: np.random.Generator, inputs: int = 70
) -> AttendAdapters:
    """Three, the first of which is none."""
    real = (mx.arange(3) > 0)[:, None]

    def sides(width: int) -> LoraSides:
        a = mx.where(real[..., None], normal(random, (3, inputs, shape.rank), dtype, inputs**-0.5), 0)
        b = mx.where(real[..., None], normal(random, (3, shape.rank, width), dtype, shape.rank**-0.5), 0)
        if not shape.dora:
            return LoraSides(a, b)
        gain, shift = (mx.where(real, normal(random, (3, width), dtype), absent) for absent in (1, 0))
        return LoraSides(a, b, gain, shift)

    q, k, v = (sides(width) if name in shape.adapted else None for name, width in zip("qkv", widths, strict=True))
    return AttendAdapters(
        normal(random, (shape.rows, inputs), dtype), mx.arange(1, 1 + shape.rows, dtype=mx.uint32) % 3, (q, k, v)
    )


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for shape in _SHAPES:
        label = f"{shape.rows} rows of {shape.capacity}, {shape.heads} heads over {shape.kv_heads} of {shape.dim}"
        before, norms = f"{shape.before} layers before" if shape.before else "", "norms" if shape.norm else ""
        adapters = f"{'DoRA' if shape.dora else 'LoRA'} of {shape.adapted}" if shape.adapted else ""
        window = f"window {shape.window}" if shape.window else ""
        shared = f"{shape.shared} shared" if shape.shared else ""
        parts = (label, before, norms, adapters, window, f"{shape.bits} bits" if shape.bits < 16 else "", shared)
        yield Case(", ".join(filter(None, parts)), _input(shape, dtype, random))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    random = np.random.default_rng(0)
    plain = [(rows, capacity, 16) for rows, capacity in ((1, 512), (1, 4096), (32, 512), (32, 2048))]
    for rows, capacity, bits in (*plain, (1, 4096, 8), (32, 512, 8), (1, 4096, 4), (32, 512, 4)):
        whole = on_device((rows, 18 * 64), dtype)
        stored = on_device((4, rows * capacity, 64), dtype)
        segment = mx.arange(rows, dtype=mx.int32)[:, None] * mx.array([0, 0, capacity], mx.int32)
        if bits < 16:
            stored = packed_kv.pack(stored, bits)
        offset = mx.array(random.integers(capacity // 2, capacity, rows), mx.int32)
        read = int(np.array(offset).sum()) * 2 * 2 * stored.shape[2] * int(stored.dtype.size)
        arguments = AttendInput(
            *(whole, whole, whole, stored, None, segment, offset, _periods(64), None, None, (0, 14 * 64, 16 * 64)),
            *(14, 2, 0.125),
            bits=bits,
        )
        label = f"{rows} rows of {capacity // 2} to {capacity}, 14 heads over 2{f', {bits} bits' if bits < 16 else ''}"

        def chain(given: tuple[Any, ...], made: list[mx.array]) -> tuple[Any, ...]:
            again = mx.concatenate([made[0], given[0][:, 14 * 64 :]], axis=1)
            return (again, again, again, *given[3:])

        yield Timing(label, arguments, read + 2 * whole.nbytes, chain)
