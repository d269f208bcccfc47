"""A residual's addition and the LayerNorm after it (Ba et al., 2016), as between an encoder's parts."""

from __future__ import annotations

import mlx.core as mx

from kernels.add_layer_norm.cases import cases, timings
from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype, threads_for, with_gradient_of

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


KERNEL = Kernel(
    name="add_layer_norm",
    reason="one launch for two, and the sum is neither written nor read again: 3 passes over the rows for 5",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    differentiable=True,
)
