"""Shapes of `lora` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device
from kernels.lora.arguments import LoraInput


def matrices(
    random: np.random.Generator, adapters: int, inputs: int, outputs: int, rank: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Random A (adapters, inputs, rank) and B (adapters, rank, outputs), of which adapter 0 is zeros."""
    a = normal(random, (adapters, inputs, rank), dtype, inputs**-0.5)
    b = normal(random, (adapters, rank, outputs), dtype, rank**-0.5)
    real = (mx.arange(adapters) > 0)[:, None, None]
    return mx.where(real, a, 0), mx.where(real, b, 0)


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    shapes = (
        (1, 2, 8, 40, 1),
        (5, 4, 512, 640, 8),
        (3, 3, 100, 300, 3),
        (4, 3, 200, 33, 64),
        (3, 3, 96, 70, 24),
        (2, 3, 70, 60, 50),
    )
    for rows, adapters, inputs, outputs, rank in shapes:
        a, b = matrices(random, adapters, inputs, outputs, rank, dtype)
        # Every other one without an axis of tokens.
        tokens = (1,) if rank % 2 else ()
        x, y = normal(random, (rows, *tokens, inputs), dtype), normal(random, (rows, *tokens, outputs), dtype)
        index = mx.array(np.arange(rows) % adapters if rows > 1 else [1], mx.uint32)
        gain, shift = None, None
        if rank in (8, 24):
            gain = mx.where((mx.arange(adapters) > 0)[:, None], normal(random, (adapters, outputs), dtype), 1)
            shift = mx.where((mx.arange(adapters) > 0)[:, None], normal(random, (adapters, outputs), dtype), 0)
        label = f"{rows} rows, {adapters - 1} adapters, rank {rank}, {inputs} → {outputs}"
        yield Case(label if gain is None else f"{label}, DoRA", LoraInput(x, y, a, b, index, gain, shift))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    random = np.random.default_rng(0)
    for rows, inputs, outputs in ((1, 896, 896), (32, 896, 896), (32, 896, 4864), (32, 4864, 896)):
        a, b = matrices(random, 9, inputs, outputs, 16, dtype)
        x, y = on_device((rows, 1, inputs), dtype), on_device((rows, 1, outputs), dtype)
        index = mx.array(1 + np.arange(rows) % 8, mx.uint32)
        used = min(rows, 8) / 9
        moved = int(x.nbytes + 2 * y.nbytes + used * (a.nbytes + b.nbytes))
        yield Timing(
            f"{rows} rows, 8 adapters, rank 16, {inputs} → {outputs}",
            LoraInput(x, y, a, b, index),
            moved,
            lambda given, made: (given[0], made[0], *given[2:]),
        )
