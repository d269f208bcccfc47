"""Keys and values of rows that decode, several layers in one array, for the kernel that attends from projections on.

A row has as many positions as it needs, wherever they are free: in one rectangle a long row would make all as long.

A token's keys and values are written by the pass after the one that made them: the kernel has them in its registers
anyway, and gives those of one layer on to the next, so that a few launches a step write the tokens of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from engine.models.attention import Mask
from engine.models.buckets import bucket
from engine.models.cache import SMALLEST_KV_LENGTH, HoldsKeyValues, KeyValues, KvSide, LayerCache, Stored
from engine.models.layers import RowAdapters
from kernels.attend import AttendAdapters

#: Positions of a row at least; and those that are nobody's.
SMALLEST, PADDING = 128, 1
#: Layers of one array. More make fewer launches; but while an array grows, it is there twice.
LAYERS_TOGETHER = 6


def together(layers: int) -> list[range]:
    """Which layers share an array: as many each as there may be, evenly."""
    count = math.ceil(layers / math.ceil(layers / LAYERS_TOGETHER))
    return [range(first, min(first + count, layers)) for first in range(0, layers, count)]


class Segment(NamedTuple):
    """Where a row's positions lie in the arrays: `size` of them from `start` on."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, eq=False)
class JointPlaces:
    """Of a pass: where it writes what the one before it made, uint32 (rows,), and where its own rows begin, int32
    (rows,)."""

    positions: mx.array
    starts: mx.array


class JointKeyValues:
    """Keys and values of every layer: arrays (heads, positions, width) of some layers each, and `fresh`.

    A layer has its heads of keys, then those of values. A row has a segment of the positions, as long as it needs: no
    row pays for the length of another, and one that changes its slot stays where it lies. Position 0 is nobody's: the
    tokens of rows that pad a batch are written there. `fresh`: what the last pass made of its rows,
    (rows, heads, width) for each array, which is written at `_positions` by the next pass, or before anything else is
    done here.
    """

    def __init__(self, model: HoldsKeyValues) -> None:
        sizes = model.kv_sizes
        self._layers, self._side, self._token = len(sizes.keys), sizes.keys[0], sizes.token_bytes
        self._parts = together(self._layers)
        self.arrays = [self._zeros(layers, PADDING) for layers in self._parts]
        self._segments: list[Segment] = []
        self._fresh: list[mx.array] = []
        self._positions: mx.array | None = None

    def _zeros(self, layers: range, positions: int) -> mx.array:
        return mx.zeros((len(layers) * 2 * self._side.heads, positions, self._side.width), self._side.kept_as)

    @property
    def heads(self) -> int:
        """Heads of keys of a layer, and of values."""
        return self._side.heads

    @property
    def positions(self) -> int:
        """Of an array."""
        return self.arrays[0].shape[1]

    @property
    def stored(self) -> Stored:
        """All arrays; what is set here takes their places."""
        return self.arrays, self._fresh, []

    @stored.setter
    def stored(self, stored: Stored) -> None:
        self.arrays, self._fresh, _ = stored

    @property
    def nbytes(self) -> int:
        return self.positions * self._token

    def segment(self, row: int) -> Segment:
        """Where a row lies."""
        return self._segments[row]

    def bytes_of(self, lengths: Sequence[int]) -> int:
        """What storage takes that holds rows of such lengths: this one, where they have room."""
        return self.nbytes if self.has_room(lengths) else _sizes(lengths)[1] * self._token

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether rows of such lengths are held as they lie."""
        held = self._segments
        return len(lengths) <= len(held) and all(n <= one.size for n, one in zip(lengths, held, strict=False))

    def room(self, lengths: Sequence[int]) -> int:
        """Positions that each of these rows has behind such a length, at least."""
        return min((one.size - n for n, one in zip(lengths, self._segments, strict=False)), default=0)

    def fit(self, lengths: Sequence[int]) -> None:
        """Have room for rows of such lengths; those that are here keep what they hold."""
        if self.has_room(lengths):
            return
        self.clear_pending()
        for row, length in enumerate(lengths):
            if row < len(self._segments) and length <= self._segments[row].size:
                continue
            size = bucket(length, SMALLEST)
            start = self._gap(size)
            if start is None:
                each, positions = _sizes(lengths)
                self._lay_out(each, max(positions, self.positions))
                return
            self._place(row, Segment(start, size))

    def _gap(self, size: int) -> int | None:
        """Where so many positions are nobody's."""
        start = PADDING
        for segment in sorted(self._segments):
            if segment.start - start >= size:
                return start
            start = segment.end
        return start if self.positions - start >= size else None

    def _place(self, row: int, segment: Segment) -> None:
        """Give a row a longer segment, with what it holds; or a new row its first."""
        if row == len(self._segments):
            self._segments.append(segment)
            return
        old = self._segments[row]
        for array in self.arrays:
            # A part that is on its way to another place would keep the array from being written in place.
            kept = mx.contiguous(array[:, old.start : old.end])
            mx.eval(kept)
            array[:, segment.start : segment.start + old.size] = kept
        self._segments[row] = segment

    def _lay_out(self, sizes: Sequence[int], positions: int) -> None:
        """Segments of these sizes, one after the other, in arrays of so many positions; what fits stays. One array at
        a time, so that old and new never both exist in full."""
        held, starts = self._segments, accumulate(sizes, initial=PADDING)
        self._segments = [Segment(start, size) for start, size in zip(starts, sizes, strict=False)]
        for index, layers in enumerate(self._parts):
            made = self._zeros(layers, positions)
            for old, new in zip(held, self._segments, strict=False):
                kept = min(old.size, new.size)
                made[:, new.start : new.start + kept] = self.arrays[index][:, old.start : old.start + kept]
            mx.eval(made)
            self.arrays[index] = made

    def padded(self, rows: int) -> int:
        """In how many rows a pass over so many comes, where it comes in buckets."""
        return bucket(rows)

    def read_length(self, length: int, tokens: int, *, bucketed: bool) -> int:
        """How many positions a pass over `tokens` of each row reads, the longest of which has `length` then. One
        token's kernel reads what each row has."""
        return bucket(length, SMALLEST_KV_LENGTH) if tokens > 1 else 1

    def shrink(self, lengths: Sequence[int]) -> None:
        """Give back what rows of such lengths do not need."""
        self.clear_pending()
        sizes, positions = _sizes(lengths)
        if positions < self.positions:
            self._lay_out(sizes, positions)
        else:
            del self._segments[len(lengths) :]

    def pending(self, offset: np.ndarray, rows: int | None = None) -> JointPlaces:
        """Of a pass over rows at `offset`. `rows`: how many of them are no padding; None: all.

        Where nothing waits to be written, the pass writes at the new tokens' own positions: the one after it writes
        them again.
        """
        if not self._fresh or self._fresh[0].shape[0] != len(offset):
            self.clear_pending()
            shapes = [(len(offset), array.shape[0], array.shape[2]) for array in self.arrays]
            self._fresh = [mx.zeros(shape, self._side.kept_as) for shape in shapes]
        starts = np.zeros(len(offset), dtype=np.int32)
        own = self._segments[: len(offset) if rows is None else rows]
        starts[: len(own)] = [segment.start for segment in own]
        now = mx.array(np.where(starts, starts + offset, 0).astype(np.uint32))
        positions, self._positions = self._positions, now
        return JointPlaces(now if positions is None else positions, mx.array(starts))

    def put(self, row: int, source: KeyValues, source_row: int, length: int) -> None:
        """Copy the first `length` positions of a row of `source` to `row`."""
        self.clear_pending()
        start = self._segments[row].start
        for array, layers in zip(self.arrays, self._parts, strict=True):
            sides = [side[layer] for layer in layers for side in (source.keys, source.values)]
            array[:, start : start + length] = mx.concatenate([side[source_row, :, :length] for side in sides], axis=0)

    def leave(self, row: int, last: int, length: int) -> None:
        """A row goes, and the last one takes its slot: it stays where it lies."""
        self._segments[row] = self._segments[last]
        del self._segments[last]

    def swap(self, row: int, other: int, length: int) -> None:
        """Let two rows change slots: they stay where they lie."""
        held = self._segments
        held[row], held[other] = held[other], held[row]

    def clear_beyond(self, lengths: list[int]) -> None:
        """Zeros in each row's positions from its length on, and in those that are nobody's. What lies there is masked,
        and 0 times NaN is NaN."""
        self.clear_pending()
        keep = np.zeros(self.positions, dtype=np.bool_)
        for segment, length in zip(self._segments, lengths, strict=False):
            keep[segment.start : segment.start + length] = True
        kept = mx.array(keep)[None, :, None]
        self.arrays = [mx.where(kept, array, mx.zeros((), array.dtype)) for array in self.arrays]

    def clear_pending(self) -> None:
        """Write what the last pass made."""
        if self._fresh and self._positions is not None:
            for array, fresh in zip(self.arrays, self._fresh, strict=True):
                _write(array, fresh, self._positions)
        self._fresh, self._positions = [], None


def _sizes(lengths: Sequence[int]) -> tuple[list[int], int]:
    """How many positions rows of such lengths have each, and an array that holds them."""
    each = [bucket(length, SMALLEST) for length in lengths]
    return each, PADDING + bucket(sum(each))


def _write(array: mx.array, fresh: mx.array, positions: mx.array) -> None:
    """Put one token a row, (rows, heads, size), at its position of an array, in place, and in one launch."""
    # Unsigned and of the full shape: else MLX would launch what makes them so.
    _, head = np.indices(fresh.shape[:2], dtype=np.uint32)
    array[mx.array(head), positions[:, None]] = fresh


class JointView:
    """What one pass of a new token a row writes and reads of `JointKeyValues`.

    `places`: of the pass; the new tokens are at `offset` of their rows. `side`: how the keys of each layer are kept,
    and its values. `first`: the layer that `stored` begins with.
    """

    def __init__(
        self,
        stored: Stored,
        offset: mx.array,
        places: JointPlaces,
        side: KvSide,
        adapters: RowAdapters | None = None,
        first: int = 0,
    ) -> None:
        self.arrays, self._fresh = list(stored[0]), list(stored[1])
        self._made: list[mx.array | None] = [None] * len(self.arrays)
        self.offset, self.starts, self._positions = offset, places.starts, places.positions
        self.bits, self._together = side.bits, self.arrays[0].shape[0] // (2 * side.heads)
        self.adapters, self._first = adapters, first

    @property
    def written(self) -> Stored:
        """All arrays, with what the pass before made, and what this one made."""
        return self.arrays, [made for made in self._made if made is not None], []

    def begin(self, layer: int) -> tuple[mx.array, mx.array | None]:
        """What is stored of a layer and its neighbours, and what this pass made of those before it among these."""
        index = self._index(layer)
        if self._made[index] is None:
            _write(self.arrays[index], self._fresh[index], self._positions)
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

    `places` and `side` as in `JointView`; the new tokens are at `offset` and after it. `mask`: which of `kv_length`
    positions each of them sees.
    """

    def __init__(
        self,
        stored: Stored,
        offset: mx.array,
        places: JointPlaces,
        tokens: int,
        kv_length: int,
        side: KvSide,
        mask: Mask,
    ) -> None:
        self.arrays, self.offset, self.mask = list(stored[0]), offset, mask
        for array, fresh in zip(self.arrays, stored[1], strict=True):
            _write(array, fresh, places.positions)
        self._side, self._together = side, self.arrays[0].shape[0] // (2 * side.heads)
        # Made once a pass: each layer would launch the same arithmetic. Unsigned and of the full shape, as in `_write`.
        _, self._heads, token = np.indices((offset.shape[0], side.heads, tokens), dtype=np.uint32)
        begin = places.starts[:, None, None]
        written = begin + offset[:, None, None] + mx.array(token.astype(np.int32))
        self._written_at = mx.where(begin > 0, written, 0).astype(mx.uint32)
        # A short row's last positions may be beyond the array: they are masked.
        read = places.starts[:, None] + mx.array(np.arange(kv_length, dtype=np.int32))
        self._read = mx.minimum(read, self.arrays[0].shape[1] - 1).astype(mx.uint32)[:, None]

    @property
    def written(self) -> Stored:
        """All arrays; nothing waits to be written."""
        return self.arrays, [], []

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        array, first = self.arrays[layer // self._together], 2 * self._side.heads * (layer % self._together)
        return self._side_of(array, first, keys), self._side_of(array, first + self._side.heads, values)

    def _side_of(self, array: mx.array, first: int, fresh: mx.array) -> mx.array:
        """Write the new tokens' keys, or values, to an array's heads from `first` on; all that the rows attend to."""
        array[mx.array(self._heads + np.uint32(first)), self._written_at] = self._side.pack(fresh)
        heads = np.arange(first, first + self._side.heads, dtype=np.uint32)[None, :, None]
        return self._side.unpack(array[mx.array(heads), self._read])


#: What a decoder's forward pass may be given.
Cache: TypeAlias = LayerCache | JointView
