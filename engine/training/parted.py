"""A rank's part of what is trained, where ranks share the model: the sides of A and B that are cut as their layer is,
and those that each rank has whole.

Of what is whole, a rank's own heads, hidden units, inputs or layers give a part of the gradient; of what is cut, all of
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from engine.adapters.flat import Matrices
from engine.adapters.sharding import axis_of, joined_parts, own_part
from engine.models.shard import Shard
from engine.training.flat import FlatLayout, Layout
from engine.training.optimizer import Moments
from engine.training.state import TrainState


class PartedLayout:
    """A `Layout` of matrices that are given whole: in the vector what every rank has lies first."""

    def __init__(self, matrices: Matrices, shard: Shard) -> None:
        self._shard, self._all = shard, FlatLayout(matrices)
        self._common = FlatLayout(_picked(matrices, shard, cut=False))
        self._cut = FlatLayout(self._parts(matrices))
        self.size = self._common.size + self._cut.size

    def pack(self, matrices: Matrices) -> mx.array:
        return mx.concatenate([self._common.pack(matrices), self._cut.pack(matrices)])

    def unpack(self, vector: mx.array) -> Matrices:
        common, cut = self._split(vector)
        return _merged(self._common.unpack(common), self._cut.unpack(cut))

    def summed(self, gradient: mx.array) -> mx.array:
        common, cut = self._split(gradient)
        return mx.concatenate([self._shard.sum(common), cut])

    def norm(self, gradient: mx.array) -> mx.array:
        common, cut = (mx.sum(part * part) for part in self._split(gradient))
        return mx.sqrt(common + self._shard.sum(cut))

    def common(self, vector: mx.array) -> mx.array:
        return vector[: self._common.size]

    def own(self, whole: TrainState) -> TrainState:
        """Of a gradient under way, rank 0 takes what is found of all that each rank has: it is summed."""
        weights, first, second = map(self._part, (whole.weights, whole.moments.first, whole.moments.second))
        gradient = None if whole.gradient is None else self._part(whole.gradient)
        if gradient is not None and self._shard.rank:
            gradient = mx.concatenate([mx.zeros((self._common.size,)), self._split(gradient)[1]])
        found = replace(whole, weights=weights, moments=Moments(first, second), gradient=gradient)
        mx.eval(found.arrays)
        return found

    def whole(self, own: TrainState) -> TrainState:
        parts = [own.weights, own.moments.first, own.moments.second]
        if own.gradient is not None:
            parts.append(self.summed(own.gradient))
        weights, first, second, *gradient = self._joined(parts)
        found = replace(own, weights=weights, moments=Moments(first, second), gradient=next(iter(gradient), None))
        mx.eval(found.arrays)
        return found

    def _split(self, vector: mx.array) -> tuple[mx.array, mx.array]:
        return vector[: self._common.size], vector[self._common.size :]

    def _part(self, whole: mx.array) -> mx.array:
        matrices = self._all.unpack(whole)
        return mx.concatenate([self._common.pack(matrices), self._cut.pack(self._parts(matrices))])

    def _parts(self, matrices: Matrices) -> Matrices:
        """This rank's, of what is cut."""
        return {
            name: {side: own_part(self._shard, name, side, array) for side, array in sides.items()}
            for name, sides in _picked(matrices, self._shard, cut=True).items()
        }

    def _joined(self, parts: Sequence[mx.array]) -> Iterator[mx.array]:
        """Whole vectors, of which each rank gives its own."""
        common, cut = zip(*map(self._split, parts), strict=True)
        of_ranks = self._shard.joined(mx.stack(list(cut))).reshape(len(parts), self._shard.size, -1)
        for known, vectors in zip(common, of_ranks, strict=True):
            ranks = [self._cut.unpack(vector) for vector in vectors]
            joined = {
                name: {
                    side: joined_parts(self._shard, name, side, [rank[name][side] for rank in ranks]) for side in sides
                }
                for name, sides in ranks[0].items()
            }
            yield self._all.pack(_merged(self._common.unpack(known), joined))


class LayeredLayout(FlatLayout):
    """A `Layout` of a rank that has whole layers. It has all of the vector, and finds the gradient of its own part."""

    def __init__(self, matrices: Matrices, shard: Shard) -> None:
        super().__init__(matrices)
        self._shard = shard

    def summed(self, gradient: mx.array) -> mx.array:
        return self._shard.sum(gradient)

    def own(self, whole: TrainState) -> TrainState:
        """Of a gradient under way, rank 0 takes all: it is summed."""
        if whole.gradient is None or not self._shard.rank:
            return whole
        return replace(whole, gradient=mx.zeros_like(whole.gradient))

    def whole(self, own: TrainState) -> TrainState:
        if own.gradient is None:
            return own
        found = replace(own, gradient=self.summed(own.gradient))
        mx.eval(found.arrays)
        return found


def layout_of(matrices: Matrices, shard: Shard) -> Layout:
    """Of matrices that are given whole."""
    return LayeredLayout(matrices, shard) if shard.split == "layers" else PartedLayout(matrices, shard)


def _picked(matrices: Matrices, shard: Shard, *, cut: bool) -> Matrices:
    found = {
        name: {side: array for side, array in sides.items() if (axis_of(shard, name, side) is not None) == cut}
        for name, sides in matrices.items()
    }
    return {name: sides for name, sides in found.items() if sides}


def _merged(first: Matrices, second: Matrices) -> Matrices:
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in first.keys() | second.keys()}
