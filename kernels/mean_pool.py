"""The end of a sentence encoder: the last addition and LayerNorm, the mean over the real tokens, the L2 norm."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from kernels.body import Body
from kernels.kernel import Arrays, Case, Kernel, Timing, float_bits, normal, on_device, refuse_dtype, with_gradient_of

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


def _cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for texts, tokens, width, normalize in (
        (1, 1, 33, True),
        (3, 7, 384, True),
        (2, 19, 768, False),
        (2, 40, 100, True),
    ):
        x, r = (normal(random, (texts, tokens, width), dtype, 2.0) for _ in range(2))
        w, b = (normal(random, (width,), dtype) for _ in range(2))
        lengths = mx.array(random.integers(1, tokens + 1, texts).astype(np.int32))
        label = f"{texts} × {tokens} × {width}{', L2' if normalize else ''}"
        yield Case(label, (x, r, w, b, lengths, 1e-12, normalize))
    # Rows so flat that eps counts; vectors of next to nothing, whose norm is below its floor as a mean, not as a sum.
    x = normal(random, (2, 40, 64), dtype, 1e-3)
    lengths, w, b = mx.array([40, 7], mx.int32), normal(random, (64,), dtype), normal(random, (64,), dtype)
    yield Case("2 × 40 × 64, flat", (x, mx.zeros_like(x), w, b, lengths, 1e-5, False))
    nothing = normal(random, (64,), dtype, 1e-14)
    yield Case("2 × 40 × 64, next to nothing, L2", (x, x, mx.zeros_like(w), nothing, lengths, 1e-5, True))


def _timings(dtype: mx.Dtype) -> Iterable[Timing]:
    for texts, tokens in ((1, 32), (100, 32), (100, 128)):
        x, r = (on_device((texts, tokens, 384), dtype) for _ in range(2))
        lengths = mx.full((texts,), tokens, mx.int32)
        arguments = (x, r, mx.ones(384, dtype), mx.zeros(384, dtype), lengths, 1e-12, True, False)
        yield Timing(f"{texts} × {tokens} × 384", arguments, 2 * x.nbytes + texts * 384 * 4, _reference)


KERNEL = Kernel(
    name="mean_pool",
    reason="one launch for about eight; hidden states are read once, without padding, never written: 2 passes for 6",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=_cases,
    timings=_timings,
    # A sum over many tokens of what was rounded: the reference's own matmul is no closer.
    tolerances={mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2},
    differentiable=True,
)
