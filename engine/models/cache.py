"""The keys and values of the tokens that the model has seen, and what one forward pass writes and reads of them."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import mlx.core as mx

from engine.models.attention import Mask

#: Keys and values of every layer, each (rows, kv_heads, capacity, head_dim).
Stored: TypeAlias = tuple[list[mx.array], list[mx.array]]


class KvSizes(Protocol):
    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Decoder(Protocol):
    """What decides how large a model's keys and values are."""

    @property
    def args(self) -> KvSizes: ...
    @property
    def dtype(self) -> mx.Dtype: ...


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

    def stored(self, layer: int) -> tuple[mx.array, mx.array] | None:
        """The whole storage of a layer, (slots, K, capacity, D) each, where row i lies in slot i; else None."""
        ...


class KeyValues:
    """Keys and values of every layer, each (rows, kv_heads, capacity, head_dim), in the model's dtype.

    The writer takes the arrays out of here and puts the new ones back before they are evaluated: MLX then writes
    in place, because nothing else holds the old ones. If anything held them, MLX would copy them whole at every step.
    """

    def __init__(self, model: Decoder, rows: int, capacity: int) -> None:
        args = model.args
        shape = (rows, args.kv_heads, capacity, args.head_dim)
        self.keys = [mx.zeros(shape, model.dtype) for _ in range(args.layers)]
        self.values = [mx.zeros(shape, model.dtype) for _ in range(args.layers)]

    @property
    def rows(self) -> int:
        return int(self.keys[0].shape[0])

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def resize(self, rows: int, capacity: int) -> None:
        """More or fewer rows and positions; what fits stays. One layer at a time, so that old and new never both exist
        in full."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        for arrays in (self.keys, self.values):
            for layer in range(len(arrays)):
                arrays[layer] = _resized(arrays[layer], rows, capacity)
                mx.eval(arrays[layer])

    def put(self, row: int, source: KeyValues, source_row: int, length: int) -> None:
        """Copy the first `length` positions of a row of `source` (which may be this) to `row`."""
        for target, origin in ((self.keys, source.keys), (self.values, source.values)):
            for layer, array in enumerate(origin):
                target[layer][row : row + 1, :, :length] = array[source_row : source_row + 1, :, :length]

    def clear_beyond(self, lengths: list[int]) -> None:
        """Zeros in each row's positions from its length on. What lies there is masked, and 0 times NaN is NaN."""
        keep = mx.arange(self.capacity)[None, None, :, None] < mx.array(lengths)[:, None, None, None]
        for arrays in (self.keys, self.values):
            for layer, array in enumerate(arrays):
                arrays[layer] = mx.where(keep, array, mx.zeros((), array.dtype))

    def row(self, row: int, length: int) -> KeyValues:
        """A copy of a row's first `length` positions, which is on its way."""
        made = object.__new__(KeyValues)
        made.keys = [mx.contiguous(array[row : row + 1, :, :length]) for array in self.keys]
        made.values = [mx.contiguous(array[row : row + 1, :, :length]) for array in self.values]
        mx.async_eval(made.keys, made.values)  # type: ignore[no-untyped-call]
        return made


def bytes_per_token(model: Decoder) -> int:
    """What one token's keys and values take: two arrays of the grouped heads in every layer."""
    args = model.args
    return 2 * args.layers * args.kv_heads * args.head_dim * int(model.dtype.size)


def _resized(array: mx.array, rows: int, capacity: int) -> mx.array:
    array = array[:rows, :, :capacity]
    more = [(0, rows - array.shape[0]), (0, 0), (0, capacity - array.shape[2]), (0, 0)]
    return mx.pad(array, more) if any(after for _, after in more) else mx.contiguous(array)


class View:
    """A `LayerCache` over keys and values for one pass: row i's new tokens lie at `offset[i]` and after it.

    `shape`: rows and tokens. `kv_length`: how many positions are read, a bound for every row. `window`: the model's.
    `exact`: one row, of which this pass fills every position that is read: attention is causal and needs no mask then.
    """

    def __init__(
        self,
        kv: Stored,
        offset: mx.array,
        shape: tuple[int, int],
        kv_length: int,
        exact: bool = False,
        window: int | None = None,
    ) -> None:
        self.keys, self.values = list(kv[0]), list(kv[1])
        self.offset, self._kv_length = offset, kv_length
        self._rows, self._tokens = shape
        # With one token, too: a sliding window hides what lies before it.
        self.mask: Mask = "causal"
        if not exact:
            keys = mx.arange(self._kv_length)[None, None]
            positions = offset[:, None, None] + mx.arange(self._tokens)[None, :, None]
            seen = keys <= positions
            if window is not None:
                seen = seen & (keys > positions - window)
            self.mask = seen[:, None]

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys[layer] = self._write(self.keys[layer], keys)
        self.values[layer] = self._write(self.values[layer], values)
        read = slice(0, self._rows), slice(None), slice(0, self._kv_length)
        return self.keys[layer][read], self.values[layer][read]

    def stored(self, layer: int) -> tuple[mx.array, mx.array]:
        return self.keys[layer], self.values[layer]

    def _write(self, storage: mx.array, new: mx.array) -> mx.array:
        if self._rows == storage.shape[0] == 1:
            return mx.slice_update(storage, new, self.offset, axes=(2,))
        rows = mx.arange(self._rows)
        if self._tokens == 1:
            storage[rows, :, self.offset] = new[:, :, 0]
        else:
            positions = self.offset[:, None] + mx.arange(self._tokens)[None]
            storage[rows[:, None], :, positions] = new.swapaxes(1, 2)
        return storage
