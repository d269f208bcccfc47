"""The keys and values of the tokens that the model has seen, and what one forward pass writes and reads of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from engine.models.attention import Mask
from engine.models.buckets import bucket
from engine.models.openings import Span
from engine.platform.compiler import on_cpu
from kernels import packed_kv
from kernels.pack_kv import pack_kv

#: Keys and values of every layer, each (rows, heads, capacity, width); and states, each (rows, …).
Stored: TypeAlias = tuple[list[mx.array], list[mx.array], list[mx.array]]


class KvSide(NamedTuple):
    """What one side of a layer, its keys or its values, holds of one token: `size` numbers of each head.

    `bits`: 16: as they are, in `dtype`. 8 or 4: packed into words (`kernels.packed_kv`).
    """

    heads: int
    size: int
    dtype: mx.Dtype
    bits: int = 16

    @property
    def packed(self) -> bool:
        return self.bits < 16

    @property
    def width(self) -> int:
        """Numbers, or words, that are kept of a head."""
        return packed_kv.words_of(self.size, self.bits) if self.packed else self.size

    @property
    def kept_as(self) -> mx.Dtype:
        """The dtype of the array."""
        return mx.uint32 if self.packed else self.dtype

    @property
    def nbytes(self) -> int:
        return self.heads * self.width * int(self.kept_as.size)

    def zeros(self, rows: int, capacity: int) -> mx.array:
        return mx.zeros((rows, self.heads, capacity, self.width), self.kept_as)

    def pack(self, x: mx.array) -> mx.array:
        """Numbers (…, size) as they are kept, (…, width)."""
        return packed_kv.pack(x, self.bits) if self.packed else x

    def unpack(self, kept: mx.array) -> mx.array:
        """The numbers (…, size) again."""
        return packed_kv.unpack(kept, self.size, self.bits, self.dtype) if self.packed else kept


class StateShape(NamedTuple):
    """What a recurrent layer keeps of one row, however many tokens it has seen."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.size)


class KvSizes(NamedTuple):
    """What a model keeps of a row: keys and values of each layer that attends, and the states of those that do not."""

    keys: Sequence[KvSide]
    values: Sequence[KvSide]
    states: Sequence[StateShape] = ()
    #: Whether rows that decode keep several layers in one array (`engine.models.joint`): all sides are alike then.
    joint: bool = False
    #: Bytes of a token, and of a row's states, on the rank that keeps most of them, where ranks have layers each: all
    #: count by it, so that the same rows make way on all of them. None: every layer is here.
    counted: tuple[int, int] | None = None

    @property
    def dtypes(self) -> list[mx.Dtype]:
        """Of all keys, then of all values, then of all states."""
        sides = [*self.keys, *self.values]
        return [side.kept_as for side in sides] + [state.dtype for state in self.states]

    @property
    def token_bytes(self) -> int:
        """Of one token, in every layer that attends."""
        if self.counted is not None:
            return self.counted[0]
        return sum(side.nbytes for side in (*self.keys, *self.values))

    @property
    def state_bytes(self) -> int:
        """Of one row's states."""
        if self.counted is not None:
            return self.counted[1]
        return sum(state.nbytes for state in self.states)

    @property
    def packed(self) -> bool:
        return any(side.packed for sides in (self.keys, self.values) for side in sides)

    def in_bits(self, bits: int) -> KvSizes:
        """The same with numbers of keys and values in so many bits."""
        if bits == 16:
            return self
        keys, values = ([side._replace(bits=bits) for side in sides] for sides in (self.keys, self.values))
        return self._replace(keys=keys, values=values)


class HoldsKeyValues(Protocol):
    """What decides how large a model's keys and values are."""

    @property
    def kv_sizes(self) -> KvSizes: ...


class LayerCache(Protocol):
    """What a model's forward pass needs of a cache."""

    @property
    def offset(self) -> int | mx.array:
        """The position of each row's first new token: one for all rows, or int32 (B,)."""
        ...

    @property
    def mask(self) -> Mask:
        """What the new tokens may attend to, for `attention`."""
        ...

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the new tokens' keys and values (B, K, T, D); all that the rows attend to, (B, K, L, D) each."""
        ...


#: The KV length, how much of the storage a pass reads, comes in sizes from this on.
SMALLEST_KV_LENGTH = 256
#: Without compiling, any size is as good as another: a multiple of this is read.
KV_LENGTH_STEP = 64


def shape_for(lengths: Sequence[int]) -> tuple[int, int]:
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
        rows, capacity = shape_for(_with(lengths, more))
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
            rows, capacity = shape_for(lengths)
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
        self.resize(*shape_for(lengths))

    def pending(self, offset: np.ndarray, rows: int | None = None) -> None:
        """What a pass has to know of where its rows lie: nothing, for each is at its own index."""

    def resize(self, rows: int, capacity: int) -> None:
        """More or fewer rows and positions; what fits stays. One layer at a time, so that old and new never both exist
        in full."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        for arrays in (self.keys, self.values):
            for layer in range(len(arrays)):
                arrays[layer] = resized(arrays[layer], rows, capacity)
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


def bytes_per_token(model: HoldsKeyValues) -> int:
    """What one token's keys and values take in every layer; a byte at least, for a model that keeps states alone."""
    return max(1, model.kv_sizes.token_bytes)


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


def resized(array: mx.array, rows: int, capacity: int) -> mx.array:
    """More or fewer rows and positions of one array; what fits stays."""
    array = array[:rows, :, :capacity]
    more = [(0, rows - array.shape[0]), (0, 0), (0, capacity - array.shape[2]), (0, 0)]
    return mx.pad(array, more) if any(after for _, after in more) else mx.contiguous(array)


def write(array: mx.array, fresh: mx.array, positions: mx.array) -> None:
    """Put one token a row, (rows, heads, size), at its position of an array, in place, and in one launch."""
    rows, heads, _ = fresh.shape
    # Unsigned and of the full shape: else MLX would launch what makes them so.
    row, head = np.indices((rows, heads), dtype=np.uint32)
    array[mx.array(row), mx.array(head), positions[:, None]] = fresh


class WriteIndices(NamedTuple):
    """Where several tokens a row are written: row, head and position of each, uint32 (rows, heads, tokens).

    Rows and heads are constants of the host's. All are unsigned and of the full shape, as in `write`.
    """

    rows: np.ndarray
    heads: np.ndarray
    positions: mx.array

    @classmethod
    def of(cls, offset: mx.array, heads: int, tokens: int) -> WriteIndices:
        """Of tokens that begin at `offset`, uint32 (rows,)."""
        row, head, token = np.indices((offset.shape[0], heads, tokens), dtype=np.uint32)
        return cls(row, head, offset[:, None, None] + mx.array(token))

    def write(self, array: mx.array, fresh: mx.array, first: int = 0) -> None:
        """Put tokens (rows, heads, tokens, size) into an array, in place, and in one launch. `first`: the array's head
        that is their first."""
        array[mx.array(self.rows), mx.array(self.heads + np.uint32(first)), self.positions] = fresh


class View:
    """A `LayerCache` over keys and values for one pass: row i's new tokens lie at `offset[i]` and after it.

    `shape`: rows and tokens. `kv_length`: how many positions are read, a bound for every row. `window`: the model's.
    `exact`: one row, of which this pass fills every position that is read: attention is causal and needs no mask then.
    `mask`: what another view of the pass made. `first`: the layer that `kv` begins with. `sizes`: the
    model's, by which keys and values are packed. Each token's are when they are written, and what is read is what was
    packed, of this pass too: a token sees the same of the others, however they are split into passes.
    """

    def __init__(
        self,
        kv: Stored,
        offset: mx.array,
        shape: tuple[int, int],
        kv_length: int,
        exact: bool = False,
        window: int | None = None,
        *,
        mask: Mask = None,
        first: int = 0,
        sizes: KvSizes | None = None,
    ) -> None:
        self.keys, self.values, self.states = (list(arrays) for arrays in kv)
        self._sizes = sizes if sizes is not None and sizes.packed else None
        self.offset, self.kv_length, self.exact, self.shape = offset, kv_length, exact, shape
        (self._rows, self._tokens), self._first = shape, first
        self._positions = offset.astype(mx.uint32)
        self._written_at: dict[int, WriteIndices] = {}
        # With one token, too: a sliding window hides what lies before it.
        self.mask: Mask = ("causal" if exact else self.seen(window)) if mask is None else mask

    @property
    def bits(self) -> int:
        """Of the numbers of keys and values."""
        return 16 if self._sizes is None else self._sizes.keys[0].bits

    @property
    def written(self) -> Stored:
        """All arrays, with what the pass wrote."""
        return self.keys, self.values, self.states

    def seen(self, window: int | None) -> mx.array:
        """Which positions each new token sees: bool (rows, 1, tokens, kv_length)."""
        # A constant of the host's: a compiled pass computes it never, and `mx.arange` each time.
        keys = mx.array(np.arange(self.kv_length, dtype=np.int32)[None, None, None])
        positions = self.offset[:, None, None, None]
        if self._tokens > 1:
            positions = positions + mx.array(np.arange(self._tokens, dtype=np.int32)[None, None, :, None])
        seen = keys <= positions
        if window is not None:
            seen = seen & (keys > positions - window)
        return seen

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        index = layer - self._first
        if self._sizes is not None:
            keys, values = pack_kv(keys, values, self._sizes.keys[layer].bits)
        self.keys[index] = self._write(self.keys[index], keys)
        self.values[index] = self._write(self.values[index], values)
        return self.read(layer)

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        """What the rows of this pass attend to in a layer that was updated."""
        read = slice(0, self._rows), slice(None), slice(0, self.kv_length)
        keys, values = self.keys[layer - self._first][read], self.values[layer - self._first][read]
        if self._sizes is None:
            return keys, values
        return self._sizes.keys[layer].unpack(keys), self._sizes.values[layer].unpack(values)

    def state(self, index: int) -> mx.array:
        """What a recurrent layer kept of the rows of this pass."""
        return self.states[index][: self._rows]

    def set_state(self, index: int, new: mx.array) -> None:
        storage = self.states[index]
        if storage.shape[0] == self._rows:
            self.states[index] = new.astype(storage.dtype)
        else:
            storage[: self._rows] = new
            self.states[index] = storage

    def _write(self, storage: mx.array, new: mx.array) -> mx.array:
        if self._rows == storage.shape[0] == 1 and on_cpu():
            # On a GPU the offset would be computed by a launch of its own, for each layer and side.
            return mx.slice_update(storage, new, self.offset, axes=(2,))
        if self._tokens == 1:
            write(storage, new[:, :, 0], self._positions)
        else:
            self._indices(storage.shape[1]).write(storage, new)
        return storage

    def _indices(self, heads: int) -> WriteIndices:
        """Where the new tokens of so many heads are written: the same in each layer, which would launch it anew."""
        if heads not in self._written_at:
            self._written_at[heads] = WriteIndices.of(self._positions, heads, self._tokens)
        return self._written_at[heads]
