"""The keys and values of the tokens that the model has seen.

`KVCache` owns the storage; a view says which rows and columns one forward pass writes and attends to. Writes are in
place as long as nobody else holds the arrays: take them from `arrays()`, evaluate them after every step, keep none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from engine.models.attention import Mask
from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from engine.models.llama import Llama

_FIRST_CAPACITY = 256
#: Decoding attends over a multiple of this many columns, so that shapes change seldom.
_COLUMNS = 64


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


class KVCache:
    """Keys and values (slots, kv_heads, capacity, head_dim) of every layer; capacity doubles when it must grow.

    With `window`, a token attends to itself and the window − 1 tokens before it (Mistral's sliding window); those that
    fell out of it are kept, but not read.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        slots: int,
        dtype: mx.Dtype = mx.float32,
        window: int | None = None,
    ):
        self.slots, self.window = slots, window
        self.capacity = _FIRST_CAPACITY
        shape = (slots, kv_heads, self.capacity, head_dim)
        self.keys = [mx.zeros(shape, dtype) for _ in range(layers)]
        self.values = [mx.zeros(shape, dtype) for _ in range(layers)]
        mx.eval(self.arrays())

    @classmethod
    def for_model(cls, model: Llama, slots: int) -> KVCache:
        """A cache of `slots` sequences for `model`, in the dtype of its weights."""
        args = model.args
        return cls(args.layers, args.kv_heads, args.head_dim, slots, model.dtype, args.window)

    def arrays(self) -> list[mx.array]:
        """Every array of the cache, to be evaluated after a step together with its result."""
        return self.keys + self.values

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def bytes_for(self, length: int) -> int:
        """What `nbytes` will be once `ensure(length)` has run: for admission by memory."""
        return self.nbytes // self.capacity * self._capacity_for(length)

    def ensure(self, length: int) -> None:
        """Grow the storage so that every slot holds `length` tokens."""
        capacity = self._capacity_for(length)
        if capacity == self.capacity:
            return
        for arrays in (self.keys, self.values):
            for layer, array in enumerate(arrays):
                arrays[layer] = mx.pad(array, [(0, 0), (0, 0), (0, capacity - self.capacity), (0, 0)])
                mx.eval(arrays[layer])  # one layer at a time: the old storage and the new never exist in full together
        self.capacity = capacity

    def prefill_view(self, slot: int, start: int, length: int) -> PrefillView:
        """`length` tokens of one sequence in `slot`, from position `start` on; the cache has those before."""
        self._check_slots([slot])
        self.ensure(start + length)
        return PrefillView(self, slot, start, length)

    def decode_view(self, slots: Sequence[int], positions: Sequence[int]) -> DecodeView:
        """One new token for each of `slots` (distinct), row i at position `positions[i]`.

        Ascending slots without a hole are read where they lie; others are joined, which copies what they hold.
        """
        self._check_slots(slots)
        if len(slots) != len(positions) or len(set(slots)) != len(slots):
            raise InvalidRequest(f"{len(positions)} positions for slots {list(slots)}: one for each, each slot once")
        self.ensure(max(positions) + 1)
        return DecodeView(self, slots, positions)

    def _capacity_for(self, length: int) -> int:
        capacity = self.capacity
        while capacity < length:
            capacity *= 2
        return capacity

    def _check_slots(self, slots: Sequence[int]) -> None:
        if not slots or min(slots) < 0 or max(slots) >= self.slots:
            raise InvalidRequest(f"slots {list(slots)}: the cache has 0 to {self.slots - 1}")


class PrefillView:
    """One sequence's run of new tokens: causal attention over everything up to it. A `LayerCache`.

    Under a sliding window it hands out the keys that the first new token sees and those after; what each of the others
    sees of them is for `attention` to say.
    """

    def __init__(self, cache: KVCache, slot: int, start: int, length: int):
        self._cache, self._slot, self._end = cache, slot, start + length
        self._first = 0 if cache.window is None else max(0, start + 1 - cache.window)
        self.offset = start
        self.mask: Mask = "causal"

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        row, columns = slice(self._slot, self._slot + 1), slice(self.offset, self._end)
        all_keys, all_values = self._cache.keys[layer], self._cache.values[layer]
        all_keys[row, :, columns] = keys
        all_values[row, :, columns] = values
        return all_keys[row, :, self._first : self._end], all_values[row, :, self._first : self._end]

    def stored(self, layer: int) -> None:
        return None


class DecodeView:
    """One new token in each of several sequences, each at its own position. A `LayerCache`."""

    def __init__(self, cache: KVCache, slots: Sequence[int], positions: Sequence[int]):
        self._cache = cache
        self.offset: mx.array = mx.array(list(positions), mx.int32)
        self._slots = mx.array(list(slots), mx.int32)
        self._runs = _runs(slots)
        window = cache.window or cache.capacity
        first, end = max(0, min(positions) + 1 - window), max(positions) + 1
        first, end = first // _COLUMNS * _COLUMNS, min(-(-end // _COLUMNS) * _COLUMNS, cache.capacity)
        self._columns = slice(first, end)
        self.mask: Mask = None
        if any(position + 1 != end or position + 1 - window > first for position in positions):
            columns, row = mx.arange(first, end)[None], self.offset[:, None]
            seen = columns <= row
            if cache.window is not None:
                seen = seen & (columns > row - window)
            self.mask = seen[:, None, None, :]

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        all_keys, all_values = self._cache.keys[layer], self._cache.values[layer]
        all_keys[self._slots, :, self.offset] = keys[:, :, 0]
        all_values[self._slots, :, self.offset] = values[:, :, 0]
        return self._read(all_keys), self._read(all_values)

    def stored(self, layer: int) -> tuple[mx.array, mx.array] | None:
        in_order = self._runs == [slice(0, self.offset.shape[0])]
        return (self._cache.keys[layer], self._cache.values[layer]) if in_order else None

    def _read(self, storage: mx.array) -> mx.array:
        parts = [storage[run, :, self._columns] for run in self._runs]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _runs(slots: Sequence[int]) -> list[slice]:
    """`slots`, in order, as the fewest slices."""
    runs: list[slice] = []
    for slot in slots:
        if runs and runs[-1].stop == slot:
            runs[-1] = slice(runs[-1].start, slot + 1)
        else:
            runs.append(slice(slot, slot + 1))
    return runs
