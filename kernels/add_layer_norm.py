"""A residual's addition and the LayerNorm after it (Ba et al., 2016), as between an encoder's parts."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.body import Body
from kernels.kernel import (
    Arrays,
    Case,
    Kernel,
    Timing,
    float_bits,
    normal,
    on_device,
    refuse_dtype,
    threads_for,
    with_gradient_of,
)  # fmt: skip

_BODY = Body("add_layer_norm", ("x", "r", "w", "b"), ("y",), ("common.h",))
#: Beyond this a thread's part of a row no longer fits its registers.
_WIDEST = 16384


def add_layer_norm(
    x: mx.array, residual: mx.array, weight: mx.array, bias: mx.array, eps: float, *, gradient: bool = True
) -> mx.array:
    """(h − mean) / sqrt(variance + eps) · weight + bias of h = x + residual, over the last axis.

    `x`, `residual`: (…, D) of one dtype, which the result has; `weight`, `bias`: (D,) of that dtype.
    `gradient`: whether it may be differentiated.
    """
    return KERNEL(x, residual, weight, bias, eps, gradient)[0]


def _reference(
    x: mx.array, residual: mx.array, weight: mx.array, bias: mx.array, eps: float, gradient: bool = True
) -> Arrays:
    return [mx.fast.layer_norm(x + residual, weight, bias, eps)]


def _refuse(
    x: mx.array, residual: mx.array, weight: mx.array, bias: mx.array, eps: float, gradient: bool = True
) -> str | None:
    if x.shape != residual.shape:
        return "shapes that are broadcast"
    if not 0 < x.shape[-1] <= _WIDEST or not x.size:
        return f"width {x.shape[-1]}"
    return refuse_dtype(x, residual, weight, bias) or (None if eps > 0 else "eps is not positive")


def _launch(
    x: mx.array, residual: mx.array, weight: mx.array, bias: mx.array, eps: float, gradient: bool = True
) -> Arrays:
    def forward(a: mx.array, r: mx.array, w: mx.array, b: mx.array) -> Arrays:
        width = a.shape[-1]
        threads = threads_for(width)
        return _BODY.launch(
            (a, r, w, b),
            template=[("T", a.dtype), ("D", width), ("ITEMS", -(-width // threads)), ("EPS", float_bits(eps))],
            groups=(a.size // width, 1),
            threads=threads,
            outputs=[(a.shape, a.dtype)],
        )

    if not gradient:
        return forward(x, residual, weight, bias)
    return with_gradient_of(lambda a, r, w, b: _reference(a, r, w, b, eps), forward)(x, residual, weight, bias)


def _cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for shape in ((1, 2), (1, 33), (6, 384), (2, 3, 1000), (3, 3072)):
        x, r = (normal(random, shape, dtype, 2.0) for _ in range(2))
        w, b = (normal(random, shape[-1:], dtype) for _ in range(2))
        yield Case(" × ".join(map(str, shape)), (x, r, w, b, 1e-5))
    # Rows so flat that eps counts.
    x = normal(random, (4, 96), dtype, 1e-3)
    w, b = (normal(random, (96,), dtype) for _ in range(2))
    yield Case("4 × 96, flat", (x, mx.zeros_like(x), w, b, 1e-5))


def _timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for rows in (32, 3200, 12800):
        x, r = (on_device((rows, 384), dtype) for _ in range(2))
        arguments = (x, r, mx.ones(384, dtype), mx.zeros(384, dtype), 1e-12, False)
        yield Timing(f"{rows} × 384", arguments, 3 * x.nbytes, _reference, lambda given, made: (made[0], *given[1:]))


KERNEL = Kernel(
    name="add_layer_norm",
    reason="one launch for two, and the sum is neither written nor read again: 3 passes over the rows for 5",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=_cases,
    timings=_timings,
    differentiable=True,
)
