"""The end of a sentence encoder: the last addition and LayerNorm, the mean over the real tokens, the L2 norm."""

from __future__ import annotations

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype, with_gradient_of
from kernels.mean_pool.cases import cases, timings

_BODY = Body("mean_pool", ("x", "r", "w", "b", "lengths"), ("y",), ("common.h",))
_THREADS = 512
#: Each lane keeps two rows' parts in registers, and the threadgroup one row.
_WIDEST = 2048


def mean_pool(
    x: mx.array,
    residual: mx.array,
    weight: mx.array,
    bias: mx.array,
    lengths: mx.array,
    eps: float,
    *,
    normalize: bool = True,
    gradient: bool = True,
) -> mx.array:
    """The mean over each text's tokens of LayerNorm(x + residual), and with `normalize` that over its L2 norm; float32.

    `x`, `residual`: (texts, tokens, D) of one dtype; `weight`, `bias`: (D,) of that dtype; `lengths`: int32 (texts,),
    from 1 to tokens: padding is on the right. The result is (texts, D). `gradient`: whether it may be differentiated.
    """
    return KERNEL(x, residual, weight, bias, lengths, eps, normalize, gradient)[0]


def _reference(
    x: mx.array,
    residual: mx.array,
    weight: mx.array,
    bias: mx.array,
    lengths: mx.array,
    eps: float,
    normalize: bool,
    gradient: bool = True,
) -> Arrays:
    hidden = mx.fast.layer_norm(x + residual, weight, bias, eps).astype(mx.float32)
    real = (mx.arange(x.shape[1])[None] < lengths[:, None]).astype(mx.float32)
    pooled = (real[:, None] @ hidden)[:, 0] / lengths[:, None]
    if not normalize:
        return [pooled]
    norm = mx.sqrt(mx.sum(mx.square(pooled), axis=-1, keepdims=True))
    return [pooled / mx.maximum(norm, 1e-12)]


def _refuse(
    x: mx.array,
    residual: mx.array,
    weight: mx.array,
    bias: mx.array,
    lengths: mx.array,
    eps: float,
    normalize: bool,
    gradient: bool = True,
) -> str | None:
    if x.ndim != 3 or x.shape != residual.shape:
        return "shapes"
    if x.shape[-1] > _WIDEST or not x.size:
        return f"width {x.shape[-1]}"
    if lengths.dtype != mx.int32:
        return f"lengths of dtype {lengths.dtype}"
    return refuse_dtype(x, residual, weight, bias) or (None if eps > 0 else "eps is not positive")


def _launch(
    x: mx.array,
    residual: mx.array,
    weight: mx.array,
    bias: mx.array,
    lengths: mx.array,
    eps: float,
    normalize: bool,
    gradient: bool = True,
) -> Arrays:
    def forward(a: mx.array, r: mx.array, w: mx.array, b: mx.array, n: mx.array) -> Arrays:
        texts, _, width = a.shape
        sizes = [("D", width), ("ITEMS", -(-width // 32))]
        return _BODY.launch(
            (a, r, w, b, n),
            template=[("T", a.dtype), *sizes, ("EPS", float_bits(eps)), ("NORMALIZE", normalize)],
            groups=(texts, 1),
            threads=_THREADS,
            outputs=[((texts, width), mx.float32)],
        )

    if not gradient:
        return forward(x, residual, weight, bias, lengths)

    def formula(a: mx.array, r: mx.array, w: mx.array, b: mx.array, n: mx.array) -> Arrays:
        return _reference(a, r, w, b, n, eps, normalize)

    return with_gradient_of(formula, forward)(x, residual, weight, bias, lengths)


KERNEL = Kernel(
    name="mean_pool",
    reason="one launch for about eight; hidden states are read once, without padding, never written: 2 passes for 6",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    # A sum over many tokens of what was rounded: the reference's own matmul is no closer.
    tolerances={mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2},
    differentiable=True,
)
