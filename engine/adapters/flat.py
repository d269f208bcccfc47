"""The numbers of an adapter in one array: what is done to all of them is one operation, where it were hundreds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

#: Linear layer's dotted name → its matrices.
Matrices = dict[str, dict[str, mx.array]]


class Place(NamedTuple):
    """Where a matrix has its numbers: behind those of the places before. `turned`: they lie column by column."""

    layer: str
    side: str
    shape: tuple[int, ...]
    turned: bool


def laid_out(matrices: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[np.ndarray, tuple[Place, ...]]:
    """All numbers, (count,), each matrix as it lies in memory, and where it is; those of the sides `b` come last."""
    found = [(name, side, array) for name, sides in matrices.items() for side, array in sides.items()]
    found.sort(key=lambda one: one[1] == "b")
    places = tuple(Place(name, side, array.shape, not array.flags.c_contiguous) for name, side, array in found)
    return np.concatenate([array.ravel("K") for *_, array in found]), places


def parts_of(numbers: mx.array, places: Sequence[Place]) -> Matrices:
    """The matrices of these places, as parts of `numbers`. Differentiable; the slope of all is one concatenation."""
    borders = list(itertools.accumulate(math.prod(place.shape) for place in places))
    found: Matrices = {}
    for place, part in zip(places, mx.split(numbers, borders[:-1]), strict=True):
        matrix = part.reshape(place.shape[::-1]).T if place.turned else part.reshape(place.shape)
        found.setdefault(place.layer, {})[place.side] = matrix
    return found


@dataclass(frozen=True)
class Flat:
    """`numbers`: (count,), float32. `places`: as `laid_out` gives them."""

    numbers: mx.array
    places: tuple[Place, ...]

    def matrices(self) -> Matrices:
        """Each as a part of the array, evaluated."""
        found = parts_of(self.numbers, self.places)
        mx.eval(found)
        return found

    def scaled(self, scale: float, dtype: mx.Dtype) -> Matrices:
        """The same in `dtype`, with all `b` times `scale`. What takes memory is evaluated, and parts of it are not."""
        first = next((index for index, place in enumerate(self.places) if place.side == "b"), len(self.places))
        border = sum(math.prod(place.shape) for place in self.places[:first])
        rest, b = self.numbers[:border].astype(dtype), (self.numbers[border:] * scale).astype(dtype)
        mx.eval(rest, b)
        found, scaled = parts_of(rest, self.places[:first]), parts_of(b, self.places[first:])
        return {layer: {**sides, **scaled[layer]} for layer, sides in found.items()}
