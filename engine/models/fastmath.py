"""exp, SiLU and GELU that MLX's CPU back-end can fuse and vectorise.

That back-end calls the C library once an element for exp (15 to 24 ns) and erf (40 ns). The forms below are polynomials
shallow enough (at most 11 operations deep) for `mx.compile` to fuse each into one vector loop of 1 to 3 ns an element.
Where nothing fuses (`compiler.fuses_on_cpu`), and on GPUs, the plain operations run. All are differentiable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from engine.platform.compiler import fuses_on_cpu, on_cpu

#: Shapeless: otherwise every shape would be traced anew, and kept, and looked through at each call.
_compile = functools.partial(mx.compile, shapeless=True)

_LOG2E = math.log2(math.e)

#: 2^(f+1) − 1 for f in (−1, 0]: a minimax polynomial (Lawson's iteration), relative error 7.5e-8, times 2^23.
_EXP2 = [
    coefficient * 2.0**23
    for coefficient in (0.99999985, 1.3862845053, 0.4803443788643, 0.1105594456775, 0.01837722368874, 0.001877576659891)
]

#: p with erfc(a/√2)/2 ≈ p(a)^−16 for a ≥ 0: absolute error of the GELU below 7e-7.
_GELU = (
    1.0442748411307197, 0.05206397794276451, 0.022113716843994824, 0.003370510496039949,
    7.532232317661314e-05, 3.964919176384363e-05, 6.988015992075158e-06,
)  # fmt: skip


def fast(x: mx.array) -> bool:
    """Whether the polynomial forms are the ones to use for `x`."""
    return x.dtype == mx.float32 and on_cpu() and fuses_on_cpu()


@_compile
def _exp_bits(x: mx.array) -> mx.array:
    """The float32 bits of e^x for x ≤ 0, as int32: exponent from the whole part, mantissa from the polynomial."""
    y = mx.maximum(x * _LOG2E, -126.0)
    whole = y.astype(mx.int32)
    f = y - whole.astype(mx.float32)
    square = f * f
    low = (_EXP2[0] + _EXP2[1] * f) + _EXP2[2] * square
    high = (_EXP2[3] + _EXP2[4] * f) + _EXP2[5] * square
    return mx.left_shift(whole + 126, 23) + (low + (square * f) * high).astype(mx.int32)


def _exp_nonpositive(x: mx.array) -> mx.array:
    return mx.view(_exp_bits(x), mx.float32)


@mx.custom_function
def _fast_exp(x: mx.array) -> mx.array:
    return _exp_nonpositive(x)


@_fast_exp.vjp
def _fast_exp_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def exp_nonpositive(x: mx.array) -> mx.array:
    """e^x for x ≤ 0 (relative error 3e-7; below −87 it is about 1e-38 instead of 0)."""
    return cast("mx.array", _fast_exp(x)) if fast(x) else mx.exp(x)


@_compile
def above(x: mx.array, weights: mx.array, floor: mx.array) -> mx.array:
    """`weights` where x > floor, else 0, of numbers that may be −inf: by arithmetic alone, which is vectorised."""
    return weights * mx.minimum(mx.maximum((x - floor) * 2.0**100, 0.0), 1.0)


@_compile
def _fast_swiglu(gate: mx.array, up: mx.array, decay: mx.array) -> mx.array:
    # silu(x) = relu(x) − |x|·σ(−|x|): a choice by `mx.where` would not be vectorised.
    return (mx.maximum(gate, 0.0) - mx.abs(gate) * decay / (1.0 + decay)) * up


def _swiglu_gradients(
    gate: mx.array, up: mx.array, sigmoid: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1.0 - sigmoid)), cotangent * silu


@_compile
def _fast_swiglu_gradients(
    gate: mx.array, up: mx.array, decay: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    return _swiglu_gradients(gate, up, mx.where(gate >= 0, 1.0, decay) / (1.0 + decay), cotangent)


@mx.custom_function
def gated_silu(gate: mx.array, up: mx.array) -> mx.array:
    if fast(gate):
        return _fast_swiglu(gate, up, _exp_nonpositive(-mx.abs(gate)))
    return gate * mx.sigmoid(gate) * up


@gated_silu.vjp
def _swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    """From gate and up alone: the sigmoid and the SiLU of every layer would else be kept for the backward pass, half of
    what an MLP keeps. By `depends`, a compiled step does not take the forward pass's for the same."""
    gate, up = mx.depends(list(primals), [cotangent])
    if fast(gate):
        return _fast_swiglu_gradients(gate, up, _exp_nonpositive(-mx.abs(gate)), cotangent)
    of_gate, _ = _swiglu_gradients(gate, up, mx.sigmoid(gate), cotangent)
    # From a gate of its own: what two results share is no part of either's fused loop: it is one of three more.
    (gate,) = mx.depends([primals[0]], [cotangent, up])
    _, of_up = _swiglu_gradients(gate, up, mx.sigmoid(gate), cotangent)
    return of_gate, of_up


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, silu(x) = x / (1 + e^−x) (Shazeer, "GLU Variants Improve Transformer", 2020)."""
    return cast("mx.array", gated_silu(gate, up))


@_compile
def _fast_gelu(x: mx.array) -> mx.array:
    a = mx.abs(x)
    a2 = a * a
    p = (_GELU[0] + _GELU[1] * a) + (_GELU[2] + _GELU[3] * a) * a2
    p = p + ((_GELU[4] + _GELU[5] * a) + _GELU[6] * a2) * (a2 * a2)
    p2 = p * p
    p4 = p2 * p2
    p8 = p4 * p4
    return mx.maximum(x, 0.0) - a / (p8 * p8)


def gelu(x: mx.array) -> mx.array:
    """x · Φ(x), the exact form by erf (Hendrycks and Gimpel, 2016); the polynomial's absolute error is below 1e-6."""
    return _fast_gelu(x) if fast(x) else x * 0.5 * (1.0 + mx.erf(x * math.sqrt(0.5)))


def approximate_gelu(x: mx.array) -> mx.array:
    """The same by tanh, at most 5e-4 from the exact one."""
    return 0.5 * x * (1.0 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@_compile
def _centred(x: mx.array, mean: mx.array) -> mx.array:
    return x - mean


@_compile
def _squared(x: mx.array) -> mx.array:
    return x * x


@_compile
def _scaled(x: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: mx.array) -> mx.array:
    return x * mx.rsqrt(variance + eps) * weight + bias


def frozen_rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x²) + eps) · w, differentiable in x alone.

    MLX's own gradient on a GPU is made for both at once: a slope in w for each token, and their sum.
    """
    if on_cpu():
        return mx.fast.rms_norm(x, weight, eps)
    return _frozen(eps)(x, weight)


@functools.cache
def _frozen(eps: float) -> Callable[[mx.array, mx.array], mx.array]:
    @mx.custom_function
    def norm(x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, eps)

    @norm.vjp
    def _(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        x, weight = primals
        _, (slope,) = mx.vjp(lambda x: mx.fast.rms_norm(x, None, eps), [x], [cotangent * weight])
        return slope, mx.zeros_like(weight)

    return cast("Callable[[mx.array, mx.array], mx.array]", norm)


@functools.cache
def _averager(dim: int) -> mx.array:
    ones = mx.full((dim, 1), 1.0 / dim)
    mx.eval(ones)
    return ones


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """(x − mean) / sqrt(variance + eps) · w + b over the last axis (Ba et al., 2016).

    On a CPU the means are products with a vector of 1/dim: BLAS adds a row many times faster than MLX's reductions.
    """
    if not fast(x):
        return mx.fast.layer_norm(x, weight, bias, eps)
    averager = _averager(x.shape[-1])
    centred = _centred(x, x @ averager)
    return _scaled(centred, _squared(centred) @ averager, weight, bias, mx.array(eps))
