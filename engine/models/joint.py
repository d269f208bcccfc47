"""Keys and values of rows that decode, several layers in one array, for the kernel that attends from projections on.

A row has as many positions as it needs, wherever they are free: in one rectangle a long row would make all as long.
Rows that begin alike have the positions of that once (`engine.models.openings`).

A token's keys and values are written by the pass after the one that made them: the kernel has them in its registers
anyway, and gives those of one layer on to the next, so that a few launches a step write the tokens of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from engine.models.attention import Mask
from engine.models.buckets import bucket
from engine.models.key_values import SMALLEST_KV_LENGTH, KeyValues, Stored
from engine.models.kv_sizes import HoldsKeyValues, KvSide
from engine.models.layers import RowAdapters
from engine.models.mixed import MixedView
from engine.models.openings import Span
from engine.models.segments import PADDING, Segment, Segments
from engine.models.view import LayerCache
from kernels.attend import AttendAdapters

#: Layers of one array. More make fewer launches, and each array is there twice while it grows.
LAYERS_TOGETHER = 6


def together(layers: int) -> list[range]:
    """Which layers share an array: as many each as there may be, evenly."""
    count = math.ceil(layers / math.ceil(layers / LAYERS_TOGETHER))
    return [range(first, min(first + count, layers)) for first in range(0, layers, count)]


@dataclass(frozen=True, eq=False)
class JointPlaces:
    """Of a pass: where it writes what the one before it made, uint32 (rows,), and where its own rows lie, int32
    (rows, 3), as in `kernels.attend`."""

    positions: mx.array
    segments: mx.array


class JointKeyValues:
    """Keys and values of every layer: arrays (heads, positions, width) of some layers each, and `fresh`.

    A layer has its heads of keys, then those of values. A row has a segment of the positions, as long as it needs: no
    row pays for the length of another, and one that changes its slot stays where it lies. Rows that begin with the same
    tokens, seen with the same adapter, have a run of positions together, which is written once and goes with the last
    of them. Position 0 is nobody's: the tokens of rows that pad a batch are written there. `fresh`: what the last pass
    made of its rows, (rows, heads, width) for each array, which is written at `_positions` by the next pass, or before
    anything else is done here.
    """

    def __init__(self, model: HoldsKeyValues) -> None:
        sizes = model.kv_sizes
        self._layers, self._side, self._token = len(sizes.keys), sizes.keys[0], sizes.token_bytes
        self._parts = together(self._layers)
        self.arrays = [self._zeros(layers, PADDING) for layers in self._parts]
        self._segments = Segments()
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
        return self._segments.rows[row]

    def bytes_of(self, lengths: Sequence[int], more: Sequence[Span] = ()) -> int:
        """What storage takes that holds rows of such lengths and those that come behind them: this one, where the rows
        have room."""
        if not more and self.has_room(lengths):
            return self.nbytes
        return self._segments.layout(lengths, more).positions * self._token

    def bytes_of_some(self, rows: Sequence[int], lengths: Sequence[int], more: Sequence[Span]) -> int:
        """What storage takes that holds these rows of it, of such lengths, with what they share now, those that come,
        and no others."""
        return self._segments.of(rows).layout(lengths, more).positions * self._token

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether rows of such lengths are held as they lie."""
        return self._segments.have_room(lengths)

    def room(self, lengths: Sequence[int]) -> int:
        """Positions that each of these rows has behind such a length, at least."""
        return self._segments.room(lengths)

    def fit(self, lengths: Sequence[int], more: Sequence[Span] = ()) -> None:
        """Have room for rows of such lengths, those that are here keep what they hold; and, wherever it may be, for
        those that come behind them."""
        if not self.has_room(lengths):
            self.clear_pending()
            if not self._grow(lengths):
                self._lay_out(lengths, more)
        if more and not self._segments.can_take(more, self.positions):
            self.clear_pending()
            self._lay_out(lengths, more)

    def _grow(self, lengths: Sequence[int]) -> bool:
        """Give each row that outgrows its segment another; False where there is no room for one."""
        for row, length in enumerate(lengths):
            if (size := self._segments.outgrown(row, length)) is None:
                continue
            start = self._segments.gap(size, self.positions)
            if start is None:
                return False
            self._give(row, start, size)
        return True

    def _give(self, row: int, start: int, size: int) -> None:
        """Give a row a longer segment, with what it holds; or a new row its first."""
        rows = self._segments.rows
        if row == len(rows):
            rows.append(Segment(start, size))
            return
        old = rows[row]
        for array in self.arrays:
            # A part that is on its way to another place would keep the array from being written in place.
            kept = mx.contiguous(array[:, old.start : old.end])
            mx.eval(kept)
            array[:, start : start + old.size] = kept
        rows[row] = old._replace(start=start, size=size)

    def _lay_out(self, lengths: Sequence[int], more: Sequence[Span] = ()) -> None:
        """Runs, then segments for rows of such lengths, one after the other, and room for those that come, in arrays
        that are no smaller; what fits stays."""
        layout = self._segments.layout(lengths, more)
        self._move(layout.sizes, max(layout.positions, self.positions))

    def _move(self, sizes: Sequence[int], positions: int) -> None:
        """Runs, then segments of these sizes, in arrays of so many positions. One array at a time, so that old and new
        never both exist in full."""
        moves = self._segments.lay_out(sizes)
        for index, layers in enumerate(self._parts):
            made = self._zeros(layers, positions)
            for move in moves:
                made[:, move.to : move.to + move.size] = self.arrays[index][:, move.start : move.start + move.size]
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
        self._segments.keep(len(lengths))
        layout = self._segments.layout(lengths)
        if layout.positions < self.positions:
            self._move(layout.sizes, layout.positions)

    def pending(self, offset: np.ndarray, rows: int | None = None) -> JointPlaces:
        """Of a pass over rows at `offset`. `rows`: how many of them are no padding; None: all.

        Where nothing waits to be written, the pass writes at the new tokens' own positions: the one after it writes
        them again.
        """
        if not self._fresh or self._fresh[0].shape[0] != len(offset):
            self.clear_pending()
            shapes = [(len(offset), array.shape[0], array.shape[2]) for array in self.arrays]
            self._fresh = [mx.zeros(shape, self._side.kept_as) for shape in shapes]
        segments = np.zeros((len(offset), 3), dtype=np.int32)
        held = self._segments.rows[: len(offset) if rows is None else rows]
        if held:
            segments[: len(held)] = [(one.run.start if one.run else 0, one.shared, one.start) for one in held]
        _, shared, own = segments.T
        now = mx.array(np.where(own, own + offset - shared, 0).astype(np.uint32))
        positions, self._positions = self._positions, now
        return JointPlaces(now if positions is None else positions, mx.array(segments))

    def add(self, row: int, span: Span, source: KeyValues, source_row: int) -> None:
        """Let a row come for which `fit` has made room, behind the others: `source` has its positions, except that of
        its newest token. Those that others have already are not copied."""
        assert row == len(self._segments.rows)
        self._segments.add(span, self.positions)
        self.put(row, source, source_row, span.length - 1)

    def put(self, row: int, source: KeyValues, source_row: int, length: int) -> None:
        """Copy the first `length` positions of a row of `source` to `row`, except those that it shares."""
        self.clear_pending()
        start, first = self.segment(row).start, self.segment(row).shared
        if length <= first:
            return
        for array, layers in zip(self.arrays, self._parts, strict=True):
            sides = [side[layer] for layer in layers for side in (source.keys, source.values)]
            own = [side[source_row, :, first:length] for side in sides]
            array[:, start : start + length - first] = mx.concatenate(own, axis=0)

    def leave(self, row: int, last: int, length: int) -> None:
        """A row goes, and the last one takes its slot: it stays where it lies. What it alone shared is nobody's."""
        self._segments.rows[row] = self._segments.rows[last]
        self._segments.keep(last)

    def swap(self, row: int, other: int, length: int) -> None:
        """Let two rows change slots: they stay where they lie."""
        rows = self._segments.rows
        rows[row], rows[other] = rows[other], rows[row]

    def clear_beyond(self, lengths: list[int]) -> None:
        """Zeros in each row's positions from its length on, and in those that are nobody's. What lies there is masked,
        and 0 times NaN is NaN."""
        self.clear_pending()
        keep = np.zeros(self.positions, dtype=np.bool_)
        for run in self._segments.runs:
            keep[run.start : run.start + run.size] = True
        for segment, length in zip(self._segments.rows, lengths, strict=False):
            keep[segment.start : segment.start + max(0, length - segment.shared)] = True
        kept = mx.array(keep)[None, :, None]
        self.arrays = [mx.where(kept, array, mx.zeros((), array.dtype)) for array in self.arrays]

    def clear_pending(self) -> None:
        """Write what the last pass made."""
        if self._fresh and self._positions is not None:
            for array, fresh in zip(self.arrays, self._fresh, strict=True):
                _write(array, fresh, self._positions)
        self._fresh, self._positions = [], None


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
        self.offset, self.segments, self._positions = offset, places.segments, places.positions
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
        run, shared, own = (places.segments[:, part, None] for part in range(3))
        # A row that pads has no positions: it writes at the one that is nobody's.
        written = (own + offset[:, None] - shared)[..., None] + mx.array(token.astype(np.int32))
        self._written_at = mx.where(own[..., None] > 0, written, 0).astype(mx.uint32)
        # A short row's last positions may be beyond the array: they are masked.
        position = mx.array(np.arange(kv_length, dtype=np.int32))
        read = position + mx.where(position < shared, run, own - shared)
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
Cache: TypeAlias = LayerCache | JointView | MixedView
