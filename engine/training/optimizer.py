"""AdamW on one flat vector."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Moments:
    """Running means of the gradient and of its square, float32 (size,)."""

    first: mx.array
    second: mx.array

    @classmethod
    def zeros(cls, size: int, dtype: mx.Dtype = mx.float32) -> Moments:
        return cls(mx.zeros((size,), dtype), mx.zeros((size,), dtype))


def adamw(
    weights: mx.array, moments: Moments, gradient: mx.array, *, step: int, rate: float, decay: float
) -> tuple[mx.array, Moments]:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): decoupled decay, bias correction by one step count for all
    weights. `step` counts from 1. torch's formula, in torch's order."""
    scalars = [1.0 - rate * decay, rate / (1.0 - BETA_1**step), (1.0 - BETA_2**step) ** -0.5]
    new, first, second = _update(weights, moments.first, moments.second, gradient, mx.array(scalars, weights.dtype))
    return new, Moments(first, second)


@mx.compile
def _update(
    weights: mx.array, first: mx.array, second: mx.array, gradient: mx.array, scalars: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    keep, pace, correction = scalars[0], scalars[1], scalars[2]
    first = BETA_1 * first + (1.0 - BETA_1) * gradient
    second = BETA_2 * second + (1.0 - BETA_2) * gradient * gradient
    return weights * keep - pace * first / (mx.sqrt(second) * correction + EPSILON), first, second


def clipped(gradient: mx.array, norm: mx.array, bound: float) -> mx.array:
    """The gradient of this norm, shortened to a norm of `bound` if it is longer."""
    return gradient * mx.minimum(bound / (norm + 1e-6), 1.0)
