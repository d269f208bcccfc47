"""Shapes of `lora_add_rms_norm` to check and to measure: those of `lora`, with a residual and a norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.kernel import Arrays, Case, Timing, normal, on_device
from kernels.lora import cases as lora
from kernels.lora.arguments import LoraInput


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for case in lora.cases(dtype, random):
        given = LoraInput(*case.arguments)
        weight = normal(random, given.y.shape[-1:], dtype)
        yield Case(case.label, (normal(random, given.y.shape, dtype), *given, weight, 1e-6))
    # Rows so small that eps counts.
    given = LoraInput(*next(iter(lora.cases(dtype, random))).arguments)
    small = LoraInput(given.x * 1e-3, given.y * 1e-3, *given[2:])
    yield Case("small", (given.y * 1e-3, *small, normal(random, given.y.shape[-1:], dtype), 1e-6))


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for timing in lora.timings(dtype):
        given = LoraInput(*timing.arguments)
        x, weight = on_device(given.y.shape, dtype), mx.ones(given.y.shape[-1], dtype)

        def chain(arguments: tuple[Any, ...], made: Arrays) -> tuple[Any, ...]:
            return (made[1], arguments[1], made[0], *arguments[3:])

        yield Timing(timing.label, (x, *given, weight, 1e-6), timing.bytes + 2 * int(x.nbytes), chain)
