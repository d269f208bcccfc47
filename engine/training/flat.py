"""All that is trained, as one vector: an optimizer step is then a few operations, not some for each of 200 arrays."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from engine.adapters.lora import Matrices


class FlatLayout:
    """Where each matrix lies in the vector: by layer, then by side."""

    def __init__(self, matrices: Matrices) -> None:
        self._shapes = {
            (name, side): array.shape
            for name, sides in sorted(matrices.items())
            for side, array in sorted(sides.items())
        }
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        self.size = sum(sizes)
        self._ends = np.cumsum(sizes[:-1]).tolist()

    def pack(self, matrices: Matrices) -> mx.array:
        """float32 (size,). Raises `KeyError` for a matrix that is missing."""
        return mx.concatenate([matrices[name][side].reshape(-1) for name, side in self._shapes])

    def unpack(self, vector: mx.array) -> Matrices:
        """The matrices; differentiable, and the slope of all of them is one concatenation."""
        matrices: Matrices = {}
        for (name, side), part in zip(self._shapes, mx.split(vector, self._ends), strict=True):
            matrices.setdefault(name, {})[side] = part.reshape(self._shapes[name, side])
        return matrices
