"""What some embedding models put behind the pooling: linear layers, each with its activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import mlx.core as mx

from engine.models.fastmath import gelu
from engine.models.layers import LayerNorm, Linear
from engine.models.sentence import DenseSpec
from engine.weights.tensors import Tensors

ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "Identity": lambda x: x,
    "Tanh": mx.tanh,
    "ReLU": lambda x: mx.maximum(x, 0.0),
    "Sigmoid": mx.sigmoid,
    "SiLU": lambda x: x * mx.sigmoid(x),
    "GELU": gelu,
}


class Layer:
    """On vectors (texts, in). `norm`: behind the activation."""

    def __init__(self, linear: Linear, activation: str = "Identity", norm: LayerNorm | None = None):
        self._linear, self._activation, self._norm = linear, ACTIVATIONS[activation], norm

    def __call__(self, vectors: mx.array) -> mx.array:
        made = self._activation(self._linear(vectors))
        return made if self._norm is None else self._norm(made)


class Dense(Layer):
    """sentence-transformers' module of this name."""

    def __init__(self, spec: DenseSpec, tensors: Tensors):
        linear = Linear.take(tensors, "linear", "", spec.inputs, spec.outputs, bias=spec.bias)
        super().__init__(linear, spec.activation)
        tensors.finish()


def through(heads: Sequence[Layer], vectors: mx.array) -> mx.array:
    """The vectors behind all of `heads`, float32."""
    return reduce(lambda x, head: head(x), heads, vectors).astype(mx.float32)
