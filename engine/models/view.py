"""What one forward pass writes and reads of `KeyValues`: where its new tokens lie, and what each of them sees."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from engine.models.attention import Mask
from engine.models.key_values import Stored
from engine.models.kv_sizes import KvSizes
from engine.platform.compiler import on_cpu
from kernels.pack_kv import pack_kv


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

    def write(self, array: mx.array, fresh: mx.array) -> None:
        """Put tokens (rows, heads, tokens, size) into an array, in place, and in one launch."""
        array[mx.array(self.rows), mx.array(self.heads), self.positions] = fresh


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
