"""The keys and values of the tokens that rows have seen, in one rectangle: a slot for each row, all equally long.

Prompts, prefixes and rows that decode are kept so; rows of models whose kernel reads several layers of one array lie in
`engine.models.joint` when they decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from engine.models.buckets import bucket
from engine.models.kv_sizes import HoldsKeyValues
from engine.models.openings import Span
from engine.platform.compiler import on_cpu

#: Keys and values of every layer, each (rows, heads, capacity, width); and states, each (rows, …).
Stored: TypeAlias = tuple[list[mx.array], list[mx.array], list[mx.array]]

#: The KV length, how much of the storage a pass reads, comes in sizes from this on.
SMALLEST_KV_LENGTH = 256
#: Without compiling, any size is as good as another: a multiple of this is read.
KV_LENGTH_STEP = 64


def _shape_for(lengths: Sequence[int]) -> tuple[int, int]:
    """(rows, capacity) of a rectangle that holds rows of such lengths."""
    return bucket(len(lengths)), bucket(max(lengths), SMALLEST_KV_LENGTH)


class KeyValues:
    """Keys and values of every layer, each (rows, heads, capacity, width), and what recurrent layers keep of each row.

    The writer takes the arrays out of here and puts the new ones back before they are evaluated: MLX then writes
    in place, because nothing else holds the old ones. If anything held them, MLX would copy them whole at every step.
    """

    def __init__(self, model: HoldsKeyValues, rows: int, capacity: int) -> None:
        sizes = model.kv_sizes
        self.rows, self.capacity = rows, capacity
        self.keys = [side.zeros(rows, capacity) for side in sizes.keys]
        self.values = [side.zeros(rows, capacity) for side in sizes.values]
        self.states = [mx.zeros((rows, *state.shape), state.dtype) for state in sizes.states]
        # Asked for at every step: adding up all arrays would take longer there than all else that memory needs.
        self._token = sizes.token_bytes
        self._state = sizes.state_bytes

    @classmethod
    def holding(cls, model: HoldsKeyValues, stored: Stored) -> KeyValues:
        """Over arrays that are there already, of one row."""
        made = cls(model, 0, 0)
        made.stored = stored
        made.rows, made.capacity = 1, stored[0][0].shape[2] if stored[0] else 0
        return made

    @property
    def stored(self) -> Stored:
        """All arrays; what is set here takes their places."""
        return self.keys, self.values, self.states

    @stored.setter
    def stored(self, stored: Stored) -> None:
        self.keys, self.values, self.states = stored

    @property
    def nbytes(self) -> int:
        return self.rows * (self.capacity * self._token + self._state)

    def bytes_of(self, lengths: Sequence[int], more: Sequence[Span] = ()) -> int:
        """What storage takes that holds rows of such lengths and those that come behind them: this one, where they have
        room. In a rectangle rows share nothing."""
        if self.has_room(_with(lengths, more)):
            return self.nbytes
        return self.bytes_of_some(range(len(lengths)), lengths, more)

    def bytes_of_some(self, _: Sequence[int], lengths: Sequence[int], more: Sequence[Span]) -> int:
        """What storage takes that holds these rows of it, of such lengths, those that come, and no others."""
        rows, capacity = _shape_for(_with(lengths, more))
        return rows * (capacity * self._token + self._state)

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether rows of such lengths are held as it is: so in nearly every step."""
        return len(lengths) <= self.rows and max(lengths, default=0) <= self.capacity

    def room(self, lengths: Sequence[int]) -> int:
        """Positions that each of these rows has behind such a length, at least."""
        return self.capacity - max(lengths, default=0)

    def fit(self, lengths: Sequence[int], more: Sequence[Span] = ()) -> None:
        """Have room for rows of such lengths and for those that come behind them."""
        if not self.has_room(lengths := _with(lengths, more)):
            rows, capacity = _shape_for(lengths)
            self.resize(max(rows, self.rows), max(capacity, self.capacity))

    def padded(self, rows: int) -> int:
        """In how many rows a pass over so many comes, where it comes in buckets."""
        return min(bucket(rows), self.rows)

    def read_length(self, length: int, tokens: int, *, bucketed: bool) -> int:
        """How many positions a pass over `tokens` of each row reads, the longest of which has `length` then."""
        read = bucket(length, SMALLEST_KV_LENGTH) if bucketed else -(-length // KV_LENGTH_STEP) * KV_LENGTH_STEP
        return min(read, self.capacity)

    def shrink(self, lengths: Sequence[int]) -> None:
        """Give back what rows of such lengths do not need."""
        self.resize(*_shape_for(lengths))

    def pending(self, offset: np.ndarray, rows: int | None = None) -> None:
        """What a pass has to know of where its rows lie: nothing, for each is at its own index."""

    def resize(self, rows: int, capacity: int) -> None:
        """More or fewer rows and positions; what fits stays. One layer at a time, so that old and new never both exist
        in full."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        for arrays in (self.keys, self.values):
            for layer in range(len(arrays)):
                arrays[layer] = _resized(arrays[layer], rows, capacity)
                mx.eval(arrays[layer])
        self.states = [_resized_rows(array, rows) for array in self.states]
        mx.eval(self.states)
        self.rows, self.capacity = rows, capacity

    def add(self, row: int, span: Span, source: KeyValues, source_row: int) -> None:
        """Let a row come for which `fit` has made room, behind the others: `source` has its positions, except that of
        its newest token."""
        self.put(row, source, source_row, span.length - 1)

    def put(self, row: int, source: KeyValues, source_row: int, length: int) -> None:
        """Copy the first `length` positions of a row of another, `source`, to `row`, and its states."""
        self._put_positions(row, source, source_row, 0, length)
        self._put_states(row, source, source_row)

    def put_pieces(self, row: int, pieces: Sequence[KeyValues], length: int) -> None:
        """Copy the first `length` positions of pieces, each of one row, that go on from each other's ends, and the
        states behind the last. A launch for each piece and array."""
        start = 0
        for piece in pieces:
            end = min(length, start + piece.capacity)
            self._put_positions(row, piece, 0, start, end)
            start = end
        self._put_states(row, pieces[-1], 0)

    def _put_positions(self, row: int, source: KeyValues, source_row: int, start: int, end: int) -> None:
        """The first positions of a row of another are those from `start` on here."""
        for target, origin in ((self.keys, source.keys), (self.values, source.values)):
            for layer, array in enumerate(origin):
                target[layer][row : row + 1, :, start:end] = array[source_row : source_row + 1, :, : end - start]

    def _put_states(self, row: int, source: KeyValues, source_row: int) -> None:
        for index, array in enumerate(source.states):
            self.states[index][row : row + 1] = array[source_row : source_row + 1]

    def leave(self, row: int, last: int, length: int) -> None:
        """A row goes, and the last one, of `length` positions, takes its slot."""
        if row != last:
            self.put(row, self._taken(last, length), 0, length)

    def swap(self, row: int, other: int, length: int) -> None:
        """Let two rows change places, the first `length` positions of each."""
        first, second = self._taken(row, length), self._taken(other, length)
        self.put(row, second, 0, length)
        self.put(other, first, 0, length)

    def _taken(self, row: int, length: int) -> KeyValues:
        """A copy of a row, to be put elsewhere. On a CPU it is there: a row that is still to be read holds all arrays,
        and MLX would copy them whole to write one row. A GPU copies them in less time than it would be waited for."""
        made = self.row(row, length)
        if on_cpu():
            mx.eval(made.keys, made.values, made.states)
        return made

    def clear_beyond(self, lengths: list[int]) -> None:
        """Zeros in each row's positions from its length on, and in rows behind these. What lies there is masked, and 0
        times NaN is NaN."""
        lengths = lengths + [0] * (self.rows - len(lengths))
        self.states = [
            mx.where(_column(lengths, array.ndim) > 0, array, mx.zeros((), array.dtype)) for array in self.states
        ]
        keep = mx.arange(self.capacity)[None, None, :, None] < _column(lengths, 4)
        for arrays in (self.keys, self.values):
            for layer, array in enumerate(arrays):
                arrays[layer] = mx.where(keep, array, mx.zeros((), array.dtype))

    def row_bytes(self, positions: int, *, states: bool = False) -> int:
        """What so many positions of a row take, and its states."""
        return positions * self._token + states * self._state

    def row(self, row: int, end: int, start: int = 0) -> KeyValues:
        """A copy of a row's positions from `start` to `end`, and of its states. It is on its way."""
        return self._part(row, start, end, self._states_of(row), self._state)

    def halves(self, length: int) -> tuple[KeyValues, KeyValues]:
        """The first `length` positions of one row, and those behind them with the states: copies, on their way. Each
        has memory of its own."""
        first = self._part(0, 0, length, [], 0)
        return first, self._part(0, length, self.capacity, self.states, self._state)

    def ending(self, other: KeyValues, row: int) -> KeyValues:
        """The same positions with a copy of the states of another's row, which is on its way."""
        states = other._states_of(row)
        mx.async_eval(states)  # type: ignore[no-untyped-call]
        return self._one_row((self.keys, self.values, states), self.capacity, other.row_bytes(0, states=True))

    def _states_of(self, row: int) -> list[mx.array]:
        return [mx.contiguous(array[row : row + 1]) for array in self.states]

    def _part(self, row: int, start: int, end: int, states: list[mx.array], state: int) -> KeyValues:
        keys, values = ([_positions(array, row, start, end) for array in arrays] for arrays in (self.keys, self.values))
        mx.async_eval(keys, values, states)  # type: ignore[no-untyped-call]
        return self._one_row((keys, values, states), end - start, state)

    def _one_row(self, stored: Stored, capacity: int, state: int) -> KeyValues:
        """`state`: bytes of its states."""
        made = object.__new__(KeyValues)
        made.stored = stored
        made.rows, made.capacity = 1, capacity
        made._token, made._state = self._token, state
        return made


def _with(lengths: Sequence[int], more: Sequence[Span]) -> list[int]:
    return [*lengths, *(span.length for span in more)]


def _positions(array: mx.array, row: int, start: int, end: int) -> mx.array:
    """A copy of these positions of a row; of all that there are, the array itself."""
    part = array[row : row + 1, :, start:end]
    # `mx.contiguous` shares the memory of a small array, with what is left out of it.
    return mx.contiguous(part) if part.shape == array.shape else mx.array(part)


def _column(lengths: list[int], dimensions: int) -> mx.array:
    return mx.array(lengths).reshape(-1, *[1] * (dimensions - 1))


def _resized_rows(array: mx.array, rows: int) -> mx.array:
    kept = array[:rows]
    more = rows - kept.shape[0]
    return mx.pad(kept, [(0, more), *[(0, 0)] * (array.ndim - 1)]) if more else mx.contiguous(kept)


def _resized(array: mx.array, rows: int, capacity: int) -> mx.array:
    """More or fewer rows and positions of one array; what fits stays."""
    array = array[:rows, :, :capacity]
    more = [(0, rows - array.shape[0]), (0, 0), (0, capacity - array.shape[2]), (0, 0)]
    return mx.pad(array, more) if any(after for _, after in more) else mx.contiguous(array)
