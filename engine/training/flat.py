"""All that is trained, as one vector: an optimizer step is then a few operations, not some for each of 200 arrays."""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx
import numpy as np

from engine.adapters.lora import Matrices
from engine.training.state import TrainState


class Layout(Protocol):
    """What a rank has of a run's vector. `together`: all ranks that share the model call it at the same time."""

    @property
    def size(self) -> int: ...

    def pack(self, matrices: Matrices) -> mx.array:
        """float32 (size,). Raises `KeyError` for a matrix that is missing."""
        ...

    def unpack(self, vector: mx.array) -> Matrices:
        """The matrices; differentiable, and the slope of all of them is one concatenation."""
        ...

    def summed(self, gradient: mx.array) -> mx.array:
        """The gradient, from what each rank has found of it; together."""
        ...

    def norm(self, gradient: mx.array) -> mx.array:
        """Of the whole gradient, a scalar; together."""
        ...

    def common(self, vector: mx.array) -> mx.array:
        """What every rank has."""
        ...

    def own(self, whole: TrainState) -> TrainState:
        """This rank's part of a state."""
        ...

    def whole(self, own: TrainState) -> TrainState:
        """The state of which each rank gives its part, evaluated; together."""
        ...


class FlatLayout:
    """Where each matrix lies in the vector: by layer, then by side. As a `Layout`, of one rank that has all."""

    def __init__(self, matrices: Matrices) -> None:
        self._shapes = {
            (name, side): array.shape
            for name, sides in sorted(matrices.items())
            for side, array in sorted(sides.items())
        }
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        self.size = sum(sizes)
        self._ends = np.cumsum(sizes[:-1]).tolist()

    @property
    def layers(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(name for name, _ in self._shapes))

    def pack(self, matrices: Matrices) -> mx.array:
        return mx.concatenate([matrices[name][side].reshape(-1) for name, side in self._shapes])

    def unpack(self, vector: mx.array) -> Matrices:
        matrices: Matrices = {}
        for (name, side), part in zip(self._shapes, mx.split(vector, self._ends), strict=True):
            matrices.setdefault(name, {})[side] = part.reshape(self._shapes[name, side])
        return matrices

    def summed(self, gradient: mx.array) -> mx.array:
        return gradient

    def norm(self, gradient: mx.array) -> mx.array:
        return mx.sqrt(mx.sum(gradient * gradient))

    def common(self, vector: mx.array) -> mx.array:
        return vector

    def own(self, whole: TrainState) -> TrainState:
        return whole

    def whole(self, own: TrainState) -> TrainState:
        return own
