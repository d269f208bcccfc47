"""The layers that the architectures share: plain classes around their weights.

No `mlx.nn.Module`: the base weights never change and are never differentiated, so a layer needs no parameter tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import mlx.core as mx

from engine.models.fastmath import frozen_rms_norm, layer_norm
from engine.weights.quantized import QuantizedTensor, dequantize
from engine.weights.tensors import Tensors
from kernels.add_layer_norm import KERNEL as ADD_LAYER_NORM
from kernels.add_layer_norm import add_layer_norm
from kernels.add_rms_norm import add_rms_norm
from kernels.lora import LoraInput, LoraSides, lora
from kernels.lora_add_rms_norm import lora_add_rms_norm
from kernels.norm_project import ProjectInput, norm_project, takes


class LayerAdapters(Protocol):
    """What low-rank adapters add to the linear layers (LoRA: Hu et al., 2021)."""

    #: Whether layers of one input are to be multiplied apart: for a gradient a joint output would be kept with its
    #: parts, which is a fifth of a training step's memory.
    apart: bool
    #: A number of what is trained, as `Shard.of_rank` takes it; None: nothing is.
    anchor: mx.array | None

    def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        """The adapted output (…, out) of the linear layer `name`: `x` (…, in) is its input, `y` its own output."""
        ...


class RowAdapters(Protocol):
    """Adapters of a batch, in which each row has its own."""

    @property
    def indices(self) -> mx.array:
        """(rows,): which of the adapters; 0 for none."""
        ...

    def sides(self, name: str) -> LoraSides | None:
        """What they change in the linear layer `name`."""
        ...


#: What a part of a block adds to hidden states: as it is, or before what the rows' adapters change of it.
Update: TypeAlias = mx.array | LoraInput
#: Hidden states, and what is left to add to them.
Sum: TypeAlias = tuple[mx.array, Update]


def adapted(update: Update) -> mx.array:
    """What is added, with what the rows' adapters change of it."""
    return lora(update) if isinstance(update, LoraInput) else update


def summed(x: mx.array, update: Update) -> mx.array:
    return x + adapted(update)


class Linear:
    """y = x·W + b, with W (in, out)."""

    def __init__(self, name: str, weight: mx.array, bias: mx.array | None = None):
        #: The full dotted path, such as `layers.3.self_attn.q_proj`; adapters are keyed by it.
        self.name = name
        self.weight, self.bias = weight, bias

    @classmethod
    def take(cls, tensors: Tensors, name: str, prefix: str, inputs: int, outputs: int, *, bias: bool = False) -> Linear:
        """The layer `name` from the tensors `{prefix}{name}.weight` (stored [out, in]) and `.bias`."""
        weight = tensors.matrix(f"{prefix}{name}.weight", (outputs, inputs), transpose=True)
        addend = tensors.take(f"{prefix}{name}.bias", (outputs,)) if bias else None
        if isinstance(weight, QuantizedTensor):
            return QuantizedLinear(name, weight, addend)
        return cls(name, weight, addend)

    def __call__(self, x: mx.array, adapters: LayerAdapters | None = None) -> mx.array:
        y = self._product(x)
        return y if adapters is None else adapters.apply(self.name, x, y)

    def unadapted(self, x: mx.array, adapters: RowAdapters | None) -> Update:
        """The output of one new token a row, as what its rows' adapters still have to change where they do: the norm
        behind it does both (`RMSNorm.of_sum`)."""
        y = self._product(x)
        sides = None if adapters is None else adapters.sides(self.name)
        if adapters is None or sides is None:
            return y
        return LoraInput(x, y, sides.a, sides.b, adapters.indices, sides.gain, sides.shift)

    def _product(self, x: mx.array) -> mx.array:
        return x @ self.weight if self.bias is None else mx.addmm(self.bias, x, self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self) -> mx.array:
        """W (in, out) as numbers; a quantized layer makes it anew at each call."""
        return self.weight

    def total(self, found: mx.array) -> mx.array:
        """What was found of its inputs, from what is found of those that are here."""
        return found


class QuantizedLinear(Linear):
    """The same with W of few bits, stored (out, in): MLX's product reads the codes. Differentiable in x alone."""

    def __init__(self, name: str, weight: QuantizedTensor, bias: mx.array | None = None):
        self.name, self.quantized, self.bias = name, weight, bias

    def _product(self, x: mx.array) -> mx.array:
        y = self.quantized.times_transposed(x)
        return y if self.bias is None else y + self.bias

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.quantized.shape
        return inputs, outputs

    def dense(self) -> mx.array:
        return dequantize(self.quantized).T


class FusedLinear:
    """Linear layers of one input as one product, their weights side by side.

    A decode step takes as long as its kernels take to be launched; this launches one where there were two or three.
    """

    def __init__(self, linears: Sequence[Linear]):
        self._linears = tuple(linears)
        #: (sum of out, in), as it lies: the part of each layer is one piece of memory. MLX on CUDA copies any other
        #: part of a matrix before it multiplies by it, the weights of a whole model twice in a training step.
        self.columns = mx.concatenate([linear.weight.T for linear in linears])
        #: The same, (in, sum of out).
        self._weight = self.columns.T
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = mx.concatenate(biases) if biases else None
        mx.eval(self.columns, self._weight, *([] if self._bias is None else [self._bias]))
        widths = [linear.shape[1] for linear in linears]
        self._borders = [sum(widths[:count]) for count in range(len(widths) + 1)]

    @classmethod
    def of(cls, tensors: Tensors, prefix: str, *linears: Linear) -> FusedLinear | None:
        """None unless all are dense, with a bias all or none. The layers' own weights become views of the joint one."""
        if any(type(linear) is not Linear for linear in linears) or len({x.bias is None for x in linears}) > 1:
            return None
        fused = cls(linears)
        for linear, first, end in zip(linears, fused._borders, fused._borders[1:], strict=False):
            linear.weight = fused._weight[:, first:end]
            mx.eval(linear.weight)
            tensors.taken[f"{prefix}{linear.name}.weight"] = linear.weight
        return fused

    def reads_sum(self, x: mx.array, update: Update, adapters: RowAdapters | None) -> bool:
        """Whether `of_sum` takes so many rows, of which no adapter changes these layers or what is to be added."""
        if isinstance(update, LoraInput) or not takes(x, self.columns):
            return False
        return adapters is None or all(adapters.sides(linear.name) is None for linear in self._linears)

    def of_sum(self, x: mx.array, update: Update, norm: RMSNorm, *, gated: bool = False) -> tuple[mx.array, mx.array]:
        """x + update, and all outputs of its norm side by side, or of two layers where it is `gated` silu(first) ·
        second: by one kernel. Not differentiated."""
        assert isinstance(update, mx.array)
        given = ProjectInput(x, update, norm.weight, self.columns, self._bias, norm.eps, gated)
        return norm_project(given)

    def product(self, x: mx.array) -> mx.array:
        """All outputs side by side, without adapters."""
        return x @ self._weight if self._bias is None else mx.addmm(self._bias, x, self._weight)

    def __call__(self, x: mx.array, adapters: LayerAdapters | None = None) -> list[mx.array]:
        """Each layer's output."""
        if adapters is not None and adapters.apart:
            return [linear(x, adapters) for linear in self._linears]
        parts: list[mx.array] = list(mx.split(self.product(x), self._borders[1:-1], axis=-1))
        if adapters is None:
            return parts
        return [adapters.apply(linear.name, x, y) for linear, y in zip(self._linears, parts, strict=True)]


class Embedding:
    """Rows of a table (rows, dim), looked up by integer ids of any shape."""

    def __init__(self, weight: mx.array):
        self.weight = weight

    @classmethod
    def take(cls, tensors: Tensors, name: str, rows: int, dim: int) -> Embedding:
        """The table of the tensor `{name}.weight`."""
        weight = tensors.matrix(f"{name}.weight", (rows, dim))
        return QuantizedEmbedding(weight) if isinstance(weight, QuantizedTensor) else cls(weight)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.weight[ids]

    def as_linear(self, x: mx.array) -> mx.array:
        """x (…, dim) times the table transposed: the head of a model with tied embeddings."""
        return x @ self.weight.T

    @property
    def dtype(self) -> mx.Dtype:
        """That of its rows, in which the model computes."""
        return self.weight.dtype


class QuantizedEmbedding(Embedding):
    """The same with a table of few bits: rows are dequantized as they are looked up."""

    def __init__(self, weight: QuantizedTensor):
        self.quantized = weight

    def __call__(self, ids: mx.array) -> mx.array:
        return self.quantized.rows(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.quantized.times_transposed(x)

    @property
    def dtype(self) -> mx.Dtype:
        return self.quantized.dtype


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · w (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: mx.array, eps: float):
        self.weight, self.eps = weight, eps

    @classmethod
    def take(cls, tensors: Tensors, name: str, dim: int, eps: float) -> RMSNorm:
        return cls(tensors.take(f"{name}.weight", (dim,)), eps)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: mx.array, update: Update, *, fused: bool) -> tuple[mx.array, mx.array]:
        """x + update, and its norm. `fused`: by one kernel where there is one; it is not differentiated then, and the
        weight never is."""
        if isinstance(update, LoraInput):
            return lora_add_rms_norm(x, update, self.weight, self.eps)
        if fused:
            return add_rms_norm(x, update, self.weight, self.eps, gradient=False)
        total = x + update
        return total, self.frozen(total)

    def frozen(self, x: mx.array) -> mx.array:
        """As a call, with no slope in the weight."""
        return frozen_rms_norm(x, self.weight, self.eps)


class LayerNorm:
    """(x − mean) / sqrt(variance + eps) · w + b (Ba et al., 2016)."""

    def __init__(self, weight: mx.array, bias: mx.array, eps: float):
        self.weight, self.bias, self.eps = weight, bias, eps

    @classmethod
    def take(cls, tensors: Tensors, name: str, dim: int, eps: float) -> LayerNorm:
        return cls(tensors.take(f"{name}.weight", (dim,)), tensors.take(f"{name}.bias", (dim,)), eps)

    def __call__(self, x: mx.array) -> mx.array:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, x: mx.array, update: mx.array) -> mx.array:
        """The norm of x + update: one kernel where there is one. Not differentiated."""
        if ADD_LAYER_NORM.active:
            return add_layer_norm(x, update, self.weight, self.bias, self.eps, gradient=False)
        return self(x + update)
