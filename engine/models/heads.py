"""What some embedding models put behind the pooling: linear layers, each with its activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Protocol

import mlx.core as mx

from engine.models.fastmath import gelu
from engine.models.layers import LayerNorm, Linear
from engine.models.sentence import DenseSpec, NormSpec
from engine.weights.tensors import Tensors

ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "Identity": lambda x: x,
    "Tanh": mx.tanh,
    "ReLU": lambda x: mx.maximum(x, 0.0),
    "Sigmoid": mx.sigmoid,
    "SiLU": lambda x: x * mx.sigmoid(x),
    "GELU": gelu,
}
#: That of a LayerNorm of torch's of which nothing else is said.
_TORCH_EPS = 1e-5


class Head(Protocol):
    """From vectors (texts, in) to vectors (texts, out)."""

    def __call__(self, vectors: mx.array, /) -> mx.array: ...


class Layer:
    """On vectors (texts, in). `norm`: behind the activation."""

    def __init__(self, linear: Linear, activation: str = "Identity", norm: LayerNorm | None = None):
        self._linear, self._activation, self._norm = linear, ACTIVATIONS[activation], norm

    def __call__(self, vectors: mx.array) -> mx.array:
        made = self._activation(self._linear(vectors))
        return made if self._norm is None else self._norm(made)


def head_of(spec: DenseSpec | NormSpec, tensors: Tensors) -> Head:
    """sentence-transformers' module of this kind, of all of `tensors`. Raises `ModelError`."""
    made: Head
    if isinstance(spec, DenseSpec):
        linear = Linear.take(tensors, "linear", "", spec.inputs, spec.outputs, bias=spec.bias)
        made = Layer(linear, spec.activation)
    else:
        made = LayerNorm.take(tensors, "norm", spec.dim, _TORCH_EPS)
    tensors.finish()
    return made


def through(heads: Sequence[Head], vectors: mx.array) -> mx.array:
    """The vectors behind all of `heads`, float32."""
    return reduce(lambda x, head: head(x), heads, vectors).astype(mx.float32)
