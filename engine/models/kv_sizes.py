"""What a model keeps of each token and of each row, and how many bytes that takes. No arrays of a row are here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from kernels import packed_kv


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


def bytes_per_token(model: HoldsKeyValues) -> int:
    """What one token's keys and values take in every layer; a byte at least, for a model that keeps states alone."""
    return max(1, model.kv_sizes.token_bytes)
