"""Shapes of `pack_kv` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, on_device


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    """Numbers of any size, so small that their step is no normal float16 too, and rows of equal ones. Heads that have
    one group of eight lanes or several of two or four, and more lanes than a simdgroup or a threadgroup."""
    for *outer, dim, bits in (
        *((2, 2, 1, 64, 8), (3, 1, 7, 80, 4), (1, 2, 5, 128, 4)),
        *((1, 1, 1, 8, 8), (2, 3, 33, 64, 4), (1, 4, 3, 96, 8)),
    ):
        scales = np.exp(random.uniform(-16, 9, (*outer, 1))) * (random.random((*outer, 1)) < 0.9)
        keys, values = (
            mx.array((random.standard_normal((*outer, dim)) * scales + shift).astype(np.float32)).astype(dtype)
            for shift in (0.0, 0.5)
        )
        yield Case(f"{' × '.join(map(str, outer))} of {dim}, {bits} bits", (keys, values, bits))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows, tokens, bits in ((1, 1, 8), (32, 1, 8), (32, 1, 4), (1, 512, 8)):
        keys, values = (on_device((rows, 2, tokens, 64), dtype) for _ in range(2))
        moved = 2 * keys.nbytes + keys.size * bits // 4
        yield Timing(f"{rows} rows of {tokens} tokens, 2 heads of 64, {bits} bits", (keys, values, bits), moved)
