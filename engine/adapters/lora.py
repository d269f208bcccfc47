"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = x W + (alpha / rank) · (x A) B, with W frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

#: Linear layer's dotted name → its matrices.
Matrices = dict[str, dict[str, mx.array]]


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    #: Last names of the layers that are changed, such as `q_proj`.
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraWeights:
    """One adapter. `matrices[name]` holds `a` (in, rank) and `b` (rank, out), float32."""

    config: LoraConfig
    matrices: Matrices

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for pair in self.matrices.values() for array in pair.values())


def target_shapes(shapes: Mapping[str, tuple[int, int]], targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The layers of a model, name → (in, out), whose last name is among `targets`."""
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in targets}


def initialise(config: LoraConfig, shapes: Mapping[str, tuple[int, int]], seed: int) -> LoraWeights:
    """A fresh adapter that changes nothing yet: A uniform in ±1/√in as in PEFT, B zero. The same seed, the same A."""
    random = np.random.default_rng(seed)
    matrices: Matrices = {}
    for name, (width_in, width_out) in sorted(target_shapes(shapes, config.targets).items()):
        bound = width_in**-0.5
        a = random.uniform(-bound, bound, (width_in, config.rank)).astype(np.float32)
        matrices[name] = {"a": mx.array(a), "b": mx.zeros((config.rank, width_out))}
    return LoraWeights(config, matrices)


class TrainableLora:
    """An adapter in the forward pass of training: one for all rows, differentiable in its matrices."""

    def __init__(self, matrices: Matrices, scale: float) -> None:
        self._matrices, self._scale = matrices, scale

    def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        """`x`: (rows, tokens, in), the layer's input; `y`: (rows, tokens, out), what the frozen layer made of it."""
        pair = self._matrices.get(name)
        return y if pair is None else y + self._scale * ((x @ pair["a"]) @ pair["b"])


class StackedLora:
    """Several adapters in one batch: row i of the batch uses the adapter `indices[i]` of each stack.

    `stacks[name]` holds `a` (adapters, in, rank) and `b` (adapters, rank, out); index 0 is zero, so that rows without
    an adapter go through the same product and come out unchanged. The scale is folded into `b`.
    """

    def __init__(self, stacks: Matrices, indices: mx.array) -> None:
        self._stacks, self._indices = stacks, indices

    def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        stack = self._stacks.get(name)
        if stack is None:
            return y
        inner = mx.gather_mm(x, stack["a"], rhs_indices=self._indices)
        return y + mx.gather_mm(inner, stack["b"], rhs_indices=self._indices)
