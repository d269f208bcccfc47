"""The layers that the architectures share: plain classes around their weights.

No `mlx.nn.Module`: the base weights never change and are never differentiated, so a layer needs no parameter tree.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from engine.weights.tensors import Tensors


class Adapters(Protocol):
    """What low-rank adapters add to the linear layers (LoRA: Hu et al., 2021)."""

    def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        """The adapted output (…, out) of the linear layer `name`: `x` (…, in) is its input, `y` its own output."""
        ...


class Linear:
    """y = x·W + b, with W stored [in, out]: a row of W is then read in order when there are few rows of x."""

    def __init__(self, name: str, weight: mx.array, bias: mx.array | None = None):
        #: The full dotted path, such as `layers.3.self_attn.q_proj`; adapters are keyed by it.
        self.name = name
        self.weight, self.bias = weight, bias

    @classmethod
    def take(cls, tensors: Tensors, name: str, prefix: str, inputs: int, outputs: int, *, bias: bool = False) -> Linear:
        """The layer `name` from the tensors `{prefix}{name}.weight` (stored [out, in]) and `.bias`."""
        weight = tensors.take(f"{prefix}{name}.weight", (outputs, inputs), transpose=True)
        return cls(name, weight, tensors.take(f"{prefix}{name}.bias", (outputs,)) if bias else None)

    def __call__(self, x: mx.array, adapters: Adapters | None = None) -> mx.array:
        y = x @ self.weight if self.bias is None else mx.addmm(self.bias, x, self.weight)
        return y if adapters is None else adapters.apply(self.name, x, y)

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weight.shape[0], self.weight.shape[1]


class Embedding:
    """Rows of a table (rows, dim), looked up by integer ids of any shape."""

    def __init__(self, weight: mx.array):
        self.weight = weight

    def __call__(self, ids: mx.array) -> mx.array:
        return self.weight[ids]

    def as_linear(self, x: mx.array) -> mx.array:
        """x (…, dim) times the table transposed: the head of a model with tied embeddings."""
        return x @ self.weight.T


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · w (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: mx.array, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class LayerNorm:
    """(x − mean) / sqrt(variance + eps) · w + b (Ba et al., 2016)."""

    def __init__(self, weight: mx.array, bias: mx.array, eps: float):
        self.weight, self.bias, self.eps = weight, bias, eps

    @classmethod
    def take(cls, tensors: Tensors, name: str, dim: int, eps: float) -> LayerNorm:
        return cls(tensors.take(f"{name}.weight", (dim,)), tensors.take(f"{name}.bias", (dim,)), eps)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, self.eps)
