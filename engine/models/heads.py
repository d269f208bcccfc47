"""What some embedding models put behind the pooling: linear layers, each with its activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import mlx.core as mx

from engine.models.fastmath import gelu
from engine.models.layers import Linear
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


class Dense:
    """sentence-transformers' module of this name, on vectors (texts, in)."""

    def __init__(self, spec: DenseSpec, tensors: Tensors):
        self._linear = Linear.take(tensors, "linear", "", spec.inputs, spec.outputs, bias=spec.bias)
        self._activation = ACTIVATIONS[spec.activation]
        tensors.finish()

    def __call__(self, vectors: mx.array) -> mx.array:
        return self._activation(self._linear(vectors))


def through(heads: Sequence[Dense], vectors: mx.array) -> mx.array:
    """The vectors behind all of `heads`, float32."""
    return reduce(lambda x, head: head(x), heads, vectors).astype(mx.float32)
