"""A residual's addition and the RMSNorm after it (Zhang and Sennrich, 2019), as between a decoder's parts."""

from __future__ import annotations

import mlx.core as mx

from kernels.add_rms_norm.cases import cases, timings
from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype, threads_for, with_gradient_of

_BODY = Body("add_rms_norm", ("x", "r", "w"), ("h", "y"), ("common.h",))
#: Beyond this a thread's part of a row no longer fits its registers.
_WIDEST = 16384


def add_rms_norm(
    x: mx.array, residual: mx.array, weight: mx.array, eps: float, *, gradient: bool = True
) -> tuple[mx.array, mx.array]:
    """(h, y): h = x + residual, y = h / sqrt(mean(h²) + eps) · weight. `gradient`: whether it may be differentiated.

    `x`, `residual`: (…, D) of one dtype, which both results have; `weight`: (D,) of that dtype.
    """
    h, y = KERNEL(x, residual, weight, eps, gradient)
    return h, y


def _reference(x: mx.array, residual: mx.array, weight: mx.array, eps: float, gradient: bool = True) -> Arrays:
    h = x + residual
    return [h, mx.fast.rms_norm(h, weight, eps)]


def _refuse(x: mx.array, residual: mx.array, weight: mx.array, eps: float, gradient: bool = True) -> str | None:
    if x.shape != residual.shape:
        return "shapes that are broadcast"
    if not 0 < x.shape[-1] <= _WIDEST or not x.size:
        return f"width {x.shape[-1]}"
    return refuse_dtype(x, residual, weight) or (None if eps > 0 else "eps is not positive")


def _launch(x: mx.array, residual: mx.array, weight: mx.array, eps: float, gradient: bool = True) -> Arrays:
    def forward(a: mx.array, b: mx.array, w: mx.array) -> Arrays:
        width = a.shape[-1]
        threads = threads_for(width)
        return _BODY.launch(
            (a, b, w),
            template=[("T", a.dtype), ("D", width), ("ITEMS", -(-width // threads)), ("EPS", float_bits(eps))],
            groups=(a.size // width, 1),
            threads=threads,
            outputs=[(a.shape, a.dtype), (a.shape, a.dtype)],
        )

    if not gradient:
        return forward(x, residual, weight)
    return with_gradient_of(lambda a, b, w: _reference(a, b, w, eps), forward)(x, residual, weight)


KERNEL = Kernel(
    name="add_rms_norm",
    reason="one launch for two, and the sum is not read again: 4 passes over the rows for 5",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    differentiable=True,
)
