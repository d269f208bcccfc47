"""What mlx-lm's layers take for their caches: a view of Stoker's keys, values and states for each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx

from engine.models.attention import Mask
from engine.models.bridge import package
from engine.models.bridge.attention import StoredKv
from engine.models.kv_sizes import KvSide, KvSizes, StateShape
from engine.models.view import View
from stoker.errors import ModelError


class SlotView(Protocol):
    """One pass, as the slots see it."""

    @property
    def offset(self) -> int | mx.array: ...
    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...
    def read(self, layer: int) -> tuple[mx.array, mx.array]: ...
    def masked(self, tokens: int, window: int | None, *, array: bool) -> Mask: ...
    def stored(self, layer: int, mask: Mask) -> StoredKv | None: ...
    def state(self, index: int) -> mx.array | None: ...
    def set_state(self, index: int, new: mx.array) -> None: ...


@dataclass(frozen=True)
class SlotShape:
    """One layer's cache, as mlx-lm makes it. `index`: of its keys and values, or of its first state.

    `window`: of `RotatingKVCache`. `states`: of `ArraysCache`. `parts`: of `CacheList`.
    """

    index: int
    window: int | None = None
    states: int = 0
    parts: tuple[SlotShape, ...] = ()

    def open(self, view: SlotView) -> Any:
        if self.parts:
            return SlotList([part.open(view) for part in self.parts])
        return _state_class()(view, self.index, self.states) if self.states else KvSlot(view, self.index, self.window)

    def moved(self, kept: Kept) -> SlotShape:
        """The same where a rank keeps what its layers need alone."""
        index = (kept.states if self.states else kept.keys).get(self.index, _ELSEWHERE)
        return replace(self, index=index, parts=tuple(part.moved(kept) for part in self.parts))


@dataclass(frozen=True)
class Kept:
    """What a rank keeps: index in the whole model → index here; and how large that is."""

    keys: Mapping[int, int]
    states: Mapping[int, int]
    sizes: KvSizes


#: The index of what another rank keeps: nothing is there.
_ELSEWHERE = 1 << 16
#: What a layer keeps that asks for nothing, and a rank whose layers do.
_NOTHING = KvSide(1, 1, mx.float32)


def shapes_of(caches: Sequence[Any]) -> list[SlotShape | None]:
    """The slots for the caches that a model makes. Raises `ModelError` for one that is not known."""
    attending, keeping = iter(range(1 << 16)), [0]

    def shape(cache: Any) -> SlotShape | None:
        kind = type(cache).__name__
        if cache is None:
            return None
        if kind == "KVCache":
            return SlotShape(next(attending))
        if kind == "RotatingKVCache" and not cache.keep:
            return SlotShape(next(attending), window=cache.max_size)
        if kind == "ArraysCache":
            first = keeping[0]
            keeping[0] += len(cache.cache)
            return SlotShape(first, states=len(cache.cache))
        if kind == "CacheList":
            parts = [shape(part) for part in cache.caches]
            return SlotShape(0, parts=tuple(part for part in parts if part is not None))
        raise ModelError(f"layers that keep a {kind} are not supported; KVCache, RotatingKVCache, ArraysCache are")

    return [shape(cache) for cache in caches]


class KvSlot:
    """An attending layer's."""

    def __init__(self, view: SlotView, index: int, window: int | None) -> None:
        self._view, self._index, self._window = view, index, window
        self._fetched: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> int | mx.array:
        return self._view.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._fetched = self._view.update(self._index, keys, values)
        return self._fetched

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What `update_and_fetch` gave in this pass: layers without keys of their own read another's."""
        self._fetched = self._view.read(self._index)
        return self._fetched

    def stored(self, keys: mx.array, values: mx.array, mask: Mask) -> StoredKv | None:
        """What these, as this gave them, are a part of; None where they or the mask are made by the model's file."""
        if self._fetched is None or keys is not self._fetched[0] or values is not self._fetched[1]:
            return None
        return self._view.stored(self._index, mask)

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        return self._view.masked(tokens, window_size or self._window, array=return_array)


class StateSlot:
    """A recurrent layer's. No row is padded here, so there are no lengths."""

    lengths = None
    left_padding = None

    def __init__(self, view: SlotView, first: int, count: int) -> None:
        self._view, self._first, self._count = view, first, count

    def __getitem__(self, index: int) -> mx.array | None:
        return self._view.state(self._first + range(self._count)[index])

    def __setitem__(self, index: int, value: mx.array) -> None:
        self._view.set_state(self._first + range(self._count)[index], value)

    def advance(self, tokens: int) -> None:
        """Only lengths would change."""

    def make_mask(self, tokens: int) -> None:
        return None


@functools.cache
def _state_class() -> type[Any]:
    """`StateSlot` as one of mlx-lm's kind, by which some files know a recurrent layer's cache."""
    return type("StateSlot", (StateSlot, package.load("cache").ArraysCache), {})


class SlotList:
    """A layer's that keeps several."""

    def __init__(self, slots: Sequence[Any]) -> None:
        self._slots = slots

    def __getitem__(self, index: int) -> Any:
        return self._slots[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._slots)


class Stepping:
    """A pass over keys and values of many rows. `grouped`: masks get an axis for the queries of one key."""

    def __init__(self, view: View, *, grouped: bool = False) -> None:
        self._view, self._grouped = view, grouped
        self._masks: dict[int | None, mx.array] = {}
        self.offset = view.offset
        self.update, self.read = view.update, view.read
        self.state: Callable[[int], mx.array] = view.state
        self.set_state = view.set_state

    def masked(self, tokens: int, window: int | None, *, array: bool) -> Mask:
        view = self._view
        if view.exact and not array and (window is None or view.kv_length <= window):
            return None if tokens == 1 else "causal"
        if window not in self._masks:
            seen = view.seen(window)
            self._masks[window] = seen[:, None] if self._grouped else seen
        return self._masks[window]

    def stored(self, layer: int, mask: Mask) -> StoredKv | None:
        """None for a mask that this has not made."""
        view = self._view
        for window, made in self._masks.items():
            if mask is made:
                return StoredKv(view.keys[layer], view.values[layer], view.offset, window, view.bits)
        return None


class Whole:
    """A pass over whole sequences, of which nothing is kept: training and scoring."""

    offset = 0

    def __init__(self) -> None:
        self._states: dict[int, mx.array] = {}
        self._made: dict[int, tuple[mx.array, mx.array]] = {}

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._made[layer] = keys, values
        return keys, values

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        return self._made[layer]

    def stored(self, layer: int, mask: Mask) -> None:
        """Nothing is kept."""

    def state(self, index: int) -> mx.array | None:
        """Nothing came before. A layer that is run again for its gradient does not find what it left."""
        return None

    def set_state(self, index: int, new: mx.array) -> None:
        self._states[index] = new

    def masked(self, tokens: int, window: int | None, *, array: bool) -> Mask:
        if not array and (window is None or tokens <= window):
            return "causal"
        positions = mx.arange(tokens)
        seen = positions[None] <= positions[:, None]
        return seen if window is None else seen & (positions[None] > positions[:, None] - window)


class Probing(Whole):
    """A pass that finds out what each layer keeps. `layer`: the number of the one that runs, where that is known."""

    def __init__(self, layer: Callable[[], int | None] = lambda: None) -> None:
        super().__init__()
        self._layer = layer
        self._sides: dict[int, tuple[KvSide, KvSide]] = {}
        #: The layers whose keys and values, and whose states, have these indices.
        self._attending: dict[int, int | None] = {}
        self._recurrent: dict[int, int | None] = {}
        #: Whether a layer reads the keys of another.
        self.shares = False

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        self.shares = True
        return super().read(layer)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        first, second = (KvSide(each.shape[1], each.shape[3], each.dtype) for each in (keys, values))
        self._sides[layer], self._attending[layer] = (first, second), self._layer()
        return super().update(layer, keys, values)

    def set_state(self, index: int, new: mx.array) -> None:
        self._recurrent[index] = self._layer()
        super().set_state(index, new)

    def kept(self, parts: Sequence[range], rank: int) -> Kept:
        """What a rank keeps, of those that have these layers. All count by the one that keeps most."""
        ranks = [self._of(layers) for layers in parts]
        counted = max(one.sizes.token_bytes for one in ranks), max(one.sizes.state_bytes for one in ranks)
        own = ranks[rank]
        return replace(own, sizes=own.sizes._replace(counted=counted))

    def _of(self, layers: range) -> Kept:
        whole = self.sizes
        keys = [index for index, layer in self._attending.items() if layer is None or layer in layers]
        states = [index for index, layer in self._recurrent.items() if layer is None or layer in layers]
        # Ranks that keep nothing at all would do otherwise than the others.
        nothing = StateShape((1,), mx.float32)
        sizes = KvSizes(
            [whole.keys[index] for index in keys] or [_NOTHING],
            [whole.values[index] for index in keys] or [_NOTHING],
            [whole.states[index] for index in states] or ([nothing] if whole.states else []),
        )
        places = [{index: place for place, index in enumerate(indices)} for indices in (keys, states)]
        return Kept(places[0], places[1], sizes)

    @property
    def sizes(self) -> KvSizes:
        """By index; a layer that never asked keeps one number a token."""
        count = max(self._sides, default=-1) + 1
        pairs = [self._sides.get(index, (_NOTHING, _NOTHING)) for index in range(count)]
        states = [self._states[index] for index in sorted(self._states)]
        if list(self._states) and sorted(self._states) != list(range(len(self._states))):
            raise ModelError("a recurrent layer leaves some of its states empty, which is not supported")
        return KvSizes(
            [keys for keys, _ in pairs],
            [values for _, values in pairs],
            [StateShape(tuple(state.shape[1:]), state.dtype) for state in states],
        )
