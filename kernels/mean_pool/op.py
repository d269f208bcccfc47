"""The end of a sentence encoder: the last addition and LayerNorm, the mean over the real tokens, the L2 norm."""

from __future__ import annotations

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype, with_gradient_of
from kernels.mean_pool.arguments import MeanPoolInput
from kernels.mean_pool.cases import cases, timings

_BODY = Body("mean_pool", ("x", "r", "w", "b", "lengths"), ("y",), ("common.h",))
_THREADS = 512
#: Each lane keeps two rows' parts in registers, and the threadgroup one row.
_WIDEST = 2048


def mean_pool(given: MeanPoolInput) -> mx.array:
    """The mean over each text's tokens of LayerNorm(x + residual), and with `normalize` that over its L2 norm.

    (texts, D), float32.
    """
    return KERNEL(*given)[0]


def _reference(given: MeanPoolInput) -> Arrays:
    x, residual, weight, bias, lengths, eps, normalize, _ = given
    hidden = mx.fast.layer_norm(x + residual, weight, bias, eps).astype(mx.float32)
    real = (mx.arange(x.shape[1])[None] < lengths[:, None]).astype(mx.float32)
    pooled = (real[:, None] @ hidden)[:, 0] / lengths[:, None]
    if not normalize:
        return [pooled]
    norm = mx.sqrt(mx.sum(mx.square(pooled), axis=-1, keepdims=True))
    return [pooled / mx.maximum(norm, 1e-12)]


def _refuse(given: MeanPoolInput) -> str | None:
    x, residual, weight, bias, lengths, eps, *_ = given
    if x.ndim != 3 or x.shape != residual.shape:
        return "shapes"
    if x.shape[-1] > _WIDEST or not x.size:
        return f"width {x.shape[-1]}"
    if lengths.dtype != mx.int32:
        return f"lengths of dtype {lengths.dtype}"
    return refuse_dtype(x, residual, weight, bias) or (None if eps > 0 else "eps is not positive")


def _launch(given: MeanPoolInput) -> Arrays:
    arrays = given[:5]

    def forward(*arrays: mx.array) -> Arrays:
        texts, _, width = arrays[0].shape
        sizes = [("D", width), ("ITEMS", -(-width // 32))]
        return _BODY.launch(
            arrays,
            template=[("T", arrays[0].dtype), *sizes, ("EPS", float_bits(given.eps)), ("NORMALIZE", given.normalize)],
            groups=(texts, 1),
            threads=_THREADS,
            outputs=[((texts, width), mx.float32)],
        )

    if not given.gradient:
        return forward(*arrays)

    def formula(*arrays: mx.array) -> Arrays:
        return _reference(MeanPoolInput._make((*arrays, *given[5:])))

    return with_gradient_of(formula, forward)(*arrays)


KERNEL = Kernel(
    name="mean_pool",
    reason="one launch for about eight; hidden states are read once, without padding, never written: 2 passes for 6",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(MeanPoolInput(*fields)),
    reference=lambda *fields: _reference(MeanPoolInput(*fields)),
    refuse=lambda *fields: _refuse(MeanPoolInput(*fields)),
    cases=cases,
    timings=timings,
    # A sum over many tokens of what was rounded: the reference's own matmul is no closer.
    tolerances={mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2},
    differentiable=True,
)
