"""All that is trained, as one vector: an optimizer step is then a few operations, not some for each of 200 arrays."""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx

from engine.adapters.flat import Matrices, Place, parts_of
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
        self._places = [
            Place(name, side, array.shape, turned=False)
            for name, sides in sorted(matrices.items())
            for side, array in sorted(sides.items())
        ]
        self.size = sum(math.prod(place.shape) for place in self._places)

    @property
    def layers(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(place.layer for place in self._places))

    def pack(self, matrices: Matrices) -> mx.array:
        return mx.concatenate([matrices[place.layer][place.side].reshape(-1) for place in self._places])

    def unpack(self, vector: mx.array) -> Matrices:
        return parts_of(vector, self._places)

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
