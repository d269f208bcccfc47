"""Keys and values of rows that decode, several layers in one array, for the kernel that attends from projections on.

A token's keys and values are written by the pass after the one that made them: the kernel has them in its registers
anyway, and gives those of one layer on to the next, so that a few launches a step write the tokens of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from engine.models.attention import Mask
from engine.models.cache import HoldsKeyValues, KeyValues, KvSide, LayerCache, Places, Stored, resized, write
from engine.models.layers import RowAdapters
from kernels.attend import AttendAdapters

#: Layers of one array. More make fewer launches; but while an array grows, it is there twice.
LAYERS_TOGETHER = 6


def together(layers: int) -> list[range]:
    """Which layers share an array: as many each as there may be, evenly."""
    count = math.ceil(layers / math.ceil(layers / LAYERS_TOGETHER))
    return [range(first, min(first + count, layers)) for first in range(0, layers, count)]


class JointKeyValues:
    """Keys and values of every layer: arrays (rows, heads, capacity, width) of some layers each, and `fresh`.

    A layer has its heads of keys, then those of values. `fresh`: what the last pass made of its rows, (rows, heads,
    width) for each array, which is written at `_positions` by the next pass, or before anything else is done here.
    """

    def __init__(self, model: HoldsKeyValues, rows: int, capacity: int) -> None:
        sizes = model.kv_sizes
        self._layers, self._side, self._token = len(sizes.keys), sizes.keys[0], sizes.token_bytes
        self.rows, self.capacity = rows, capacity
        self._parts = together(self._layers)
        heads = [len(layers) * 2 * self._side.heads for layers in self._parts]
        self.arrays = [self._side._replace(heads=count).zeros(rows, capacity) for count in heads]
        self._fresh: list[mx.array] = []
        self._positions: mx.array | None = None

    @property
    def heads(self) -> int:
        """Heads of keys of a layer, and of values."""
        return self._side.heads

    @property
    def stored(self) -> Stored:
        """All arrays; what is set here takes their places."""
        return self.arrays, self._fresh, []

    @stored.setter
    def stored(self, stored: Stored) -> None:
        self.arrays, self._fresh, _ = stored

    @property
    def nbytes(self) -> int:
        return self.rows * self.capacity * self._token

    def pending(self, offset: np.ndarray) -> mx.array:
        """Where a pass over rows at `offset` has to write what the one before it made; that one's tokens follow.

        Where nothing waits, at the new tokens' own positions: the pass after writes them again.
        """
        if not self._fresh or self._fresh[0].shape[0] != len(offset):
            self._write_fresh()
            self._fresh = [
                mx.zeros((len(offset), array.shape[1], array.shape[3]), array.dtype) for array in self.arrays
            ]
        now = mx.array(offset.astype(np.uint32))
        positions, self._positions = self._positions, now
        return now if positions is None else positions

    def resize(self, rows: int, capacity: int) -> None:
        """More or fewer rows and positions; what fits stays. One array at a time, so that old and new never both exist
        in full."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        self._write_fresh()
        for index in range(len(self.arrays)):
            self.arrays[index] = resized(self.arrays[index], rows, capacity)
            mx.eval(self.arrays[index])
        self.rows, self.capacity = rows, capacity

    def put(self, row: int, source: KeyValues, source_row: int, length: int) -> None:
        """Copy the first `length` positions of a row of `source` to `row`."""
        self._write_fresh()
        for array, layers in zip(self.arrays, self._parts, strict=True):
            sides = [side[layer] for layer in layers for side in (source.keys, source.values)]
            found = mx.concatenate([side[source_row : source_row + 1, :, :length] for side in sides], axis=1)
            array[row : row + 1, :, :length] = found

    def move(self, row: int, source_row: int, length: int) -> None:
        """Copy the first `length` positions of a row to another."""
        self._write_fresh()
        for array in self.arrays:
            array[row : row + 1, :, :length] = array[source_row : source_row + 1, :, :length]

    def swap(self, row: int, other: int, length: int) -> None:
        """Let two rows change places, the first `length` positions of each."""
        self._write_fresh()
        for array in self.arrays:
            kept = mx.contiguous(array[row : row + 1, :, :length])
            mx.eval(kept)
            array[row : row + 1, :, :length] = array[other : other + 1, :, :length]
            array[other : other + 1, :, :length] = kept

    def clear_beyond(self, lengths: list[int]) -> None:
        """Zeros in each row's positions from its length on. What lies there is masked, and 0 times NaN is NaN."""
        self._write_fresh()
        keep = mx.arange(self.capacity)[None, None, :, None] < mx.array(lengths)[:, None, None, None]
        self.arrays = [mx.where(keep, array, mx.zeros((), array.dtype)) for array in self.arrays]

    def _write_fresh(self) -> None:
        if self._fresh and self._positions is not None:
            for array, fresh in zip(self.arrays, self._fresh, strict=True):
                write(array, fresh, self._positions)
        self._fresh, self._positions = [], None


class JointView:
    """What one pass of a new token a row writes and reads of `JointKeyValues`.

    `positions`: where what the pass before made is written, uint32 (rows,); the new tokens are at `offset`. `side`: how
    the keys of each layer are kept, and its values. `first`: the layer that `stored` begins with.
    """

    def __init__(
        self,
        stored: Stored,
        offset: mx.array,
        positions: mx.array,
        side: KvSide,
        adapters: RowAdapters | None = None,
        first: int = 0,
    ) -> None:
        self.arrays, self._fresh = list(stored[0]), list(stored[1])
        self._made: list[mx.array | None] = [None] * len(self.arrays)
        self.offset, self._positions = offset, positions
        self.bits, self._together = side.bits, self.arrays[0].shape[1] // (2 * side.heads)
        self.adapters, self._first = adapters, first

    @property
    def written(self) -> Stored:
        """All arrays, with what the pass before made, and what this one made."""
        return self.arrays, [made for made in self._made if made is not None], []

    def begin(self, layer: int) -> tuple[mx.array, mx.array | None]:
        """What is stored of a layer and its neighbours, and what this pass made of those before it among these."""
        index = self._index(layer)
        if self._made[index] is None:
            write(self.arrays[index], self._fresh[index], self._positions)
        return self.arrays[index], self._made[index]

    def attend_adapters(self, x: mx.array, names: Sequence[str]) -> AttendAdapters | None:
        """What the rows' adapters change in q, k and v of these names, whose input is x (rows, in)."""
        if self.adapters is None:
            return None
        q, k, v = (self.adapters.sides(name) for name in names)
        return None if q is k is v is None else AttendAdapters(x, self.adapters.indices, (q, k, v))

    def keep(self, layer: int, made: mx.array) -> None:
        """What `begin` gave of this pass, with the new token of this layer behind it."""
        self._made[self._index(layer)] = made

    def _index(self, layer: int) -> int:
        return (layer - self._first) // self._together


class JointRun:
    """A `LayerCache` over `JointKeyValues` for one pass of several new tokens a row, which it writes itself.

    `positions` and `side` as in `JointView`; the new tokens are at `offset` and after it. `mask`: which of `kv_length`
    positions each of them sees.
    """

    def __init__(
        self,
        stored: Stored,
        offset: mx.array,
        positions: mx.array,
        tokens: int,
        kv_length: int,
        side: KvSide,
        mask: Mask,
    ) -> None:
        self.arrays, self.offset, self.mask = list(stored[0]), offset, mask
        for array, fresh in zip(self.arrays, stored[1], strict=True):
            write(array, fresh, positions)
        self._rows, self._kv_length, self._side = offset.shape[0], kv_length, side
        self._places = Places.of(offset.astype(mx.uint32), side.heads, tokens)
        self._together = self.arrays[0].shape[1] // (2 * side.heads)

    @property
    def written(self) -> Stored:
        """All arrays; nothing waits to be written."""
        return self.arrays, [], []

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        array, heads = self.arrays[layer // self._together], self._side.heads
        first = 2 * heads * (layer % self._together)
        self._places.write(array, self._side.pack(keys), first)
        self._places.write(array, self._side.pack(values), first + heads)
        seen = self._side.unpack(array[: self._rows, first : first + 2 * heads, : self._kv_length])
        return seen[:, :heads], seen[:, heads:]


#: What a decoder's forward pass may be given.
Cache: TypeAlias = LayerCache | JointView
