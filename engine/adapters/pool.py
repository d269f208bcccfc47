"""The adapters of one model that are in memory, stacked so that one batch can mix them."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import mlx.core as mx

from engine.adapters.flat import Flat, Matrices
from engine.adapters.lora import LoraWeights, adapted_norms, square_norms
from engine.adapters.sharding import part_of
from engine.adapters.stacked import StackedLora, folded
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel

log = logging.getLogger(__name__)

#: The index of the bare base in every stack.
BASE = 0
#: Bytes that the stacks of one model may take while nobody needs more.
BUDGET = 512 << 20
_FIRST_RANK, _FIRST_CAPACITY = 8, 4
#: What an adapter that lacks a side stands for.
_NEUTRAL = {"a": 0.0, "b": 0.0, "gain": 1.0, "shift": 0.0}


@dataclass
class _Held:
    name: str
    #: Below 0 once its files have become others: nobody finds it, and those who use it keep it.
    version: int
    #: When it was last asked for, in a count of its own.
    used: int
    #: Of the files that it was read from.
    stamp: int


class AdapterPool:
    """Loads adapters on first use and hands out their index in the stacks.

    A request holds the version it started with: a newer one gets an index of its own. Versions that nobody uses stay
    until room is needed, and then the one goes that was used longest ago. `budget` bounds the stacks in bytes; only
    adapters that are all in use at once may take more.

    The stacks have room for more adapters, and for larger ranks, than they hold: loading one writes its row, and the
    shapes that a compiled step has seen stay as they are. All except `loaded`, and what says that it may come from any
    thread, run in the engine's.
    """

    def __init__(self, model: LoadedModel, store: AdapterStore, budget: int = BUDGET) -> None:
        self._model, self._store, self._budget = model, store, budget
        self._linears = model.decoder.linears
        #: By index in the stacks; None: free. The first is the base's, and never free.
        self._held: list[_Held | None] = [None] * _FIRST_CAPACITY
        self._uses: Counter[int] = Counter()
        self._clock = itertools.count()
        self._rank = _FIRST_RANK
        self._stacks: Matrices = {}
        self._squares: dict[str, mx.array] = {}
        #: What was measured, until it is dropped: name and version → layer → `adapted_norms`. Who measures drops what
        #: is too much; none goes with its row in the stacks, because one rank alone could not measure it again.
        self._norms: dict[tuple[str, int], dict[str, mx.array]] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(f"{held.name}@{held.version}" for held in list(self._held) if held and held.version > 0)

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for stack in self._stacks.values() for array in stack.values())

    def check(self, adapter: str) -> None:
        """Raise `UnknownAdapter` unless the store has it. From any thread."""
        self._store.resolve(self._model.name, adapter)

    def resolved(self, adapter: str | None) -> tuple[str, int] | None:
        """What `identity` will say of it, unless a newer version comes meanwhile. Raises as `check`. From any
        thread."""
        return None if adapter is None else self._store.resolve(self._model.name, adapter)

    def acquire(self, adapter: str | None) -> int:
        """The index of `name` (its newest version), `name@version` or None (the base), to be given back by `release`.

        Raises `UnknownAdapter`, or `ModelError` for files that are damaged or of another model.
        """
        index = BASE
        if adapter is not None:
            name, version = self._store.resolve(self._model.name, adapter)
            found = self._find(name, version)
            if found is None:
                stamp = self.stamp(name, version)
                found = self._hold(name, version, self.own(self.read(name, version)), stamp)
            index = found
            self._touch(index)
        self._uses[index] += 1
        return index

    def stamp(self, name: str, version: int) -> int:
        """See `AdapterStore.stamp`. From any thread."""
        return self._store.stamp(self._model.name, name, version)

    def is_of_others(self, name: str, version: int) -> bool:
        """Whether a version is in memory of other files than it has now, as another process may have put them there.
        From any thread."""
        stamp = self.stamp(name, version)
        held = [one for one in list(self._held) if one and (one.name, one.version) == (name, version)]
        return any(one.stamp != stamp for one in held)

    def read(self, name: str, version: int) -> LoraWeights:
        """The whole files of a version; raises `ModelError` as `acquire`."""
        return self._store.read(self._model.name, name, version, self._model.linear_shapes)

    def identity(self, index: int) -> tuple[str, int] | None:
        """The name and version behind an acquired index; None for the base. The version is a number of its own, below
        0, where `drop` took it from the weights in use."""
        held = self._held[index]
        return (held.name, held.version) if held else None

    def release(self, index: int) -> None:
        self._uses[index] -= 1
        held = self._held[index]
        if held is not None and held.version < 0 and not self._uses[index]:
            self._held[index] = None

    @property
    def in_use(self) -> int:
        """Rows that have acquired an adapter and not released it."""
        return self._uses.total()

    def save(self, name: str, weights: LoraWeights, notes: Mapping[str, object], version: int | None = None) -> int:
        """Write a trained adapter as a version, by default the next one, and hold it, if there is memory for it now; of
        a model that ranks share, all of them do so when a job asks for it."""
        own = self.own(weights)
        version = self._store.write(self._model.name, name, weights, notes, version)
        if self._model.shard is None and self._find(name, version) is None:
            self._hold_if_possible(name, version, own)
        return version

    def _hold_if_possible(self, name: str, version: int, weights: LoraWeights) -> None:
        """What is written is made: its job does not fail because there is too little memory to serve it now."""
        try:
            self._hold(name, version, weights, self.stamp(name, version))
        except (MemoryError, RuntimeError) as error:
            log.warning("%s@%d is written, and not held in memory: %s", name, version, error)

    def own(self, weights: LoraWeights) -> LoraWeights:
        """What this process needs of an adapter."""
        shard = self._model.shard
        return weights if shard is None else part_of(weights, shard, self._linears)

    def drop(self, name: str, version: int) -> None:
        """Read a version's files anew when it is asked for again. Those that use it keep what they have."""
        self._norms.pop((name, version), None)
        index = self._find(name, version)
        if index is None:
            return
        held = self._held[index]
        assert held is not None
        if self._uses[index]:
            held.version = -1 - next(self._clock)
        else:
            self._held[index] = None

    def rows(self, indices: Sequence[int]) -> StackedLora | None:
        """What the forward pass of a batch needs, one index a row; None if all rows are the bare base, or adapters
        change layers of other ranks alone."""
        if not self._stacks or all(index == BASE for index in indices):
            return None
        return StackedLora(self._stacks, mx.array(list(indices), dtype=mx.uint32))

    def _find(self, name: str, version: int) -> int | None:
        for index, held in enumerate(self._held):
            if held and (held.name, held.version) == (name, version):
                return index
        return None

    def _touch(self, index: int) -> None:
        held = self._held[index]
        assert held is not None
        held.used = next(self._clock)

    def _hold(self, name: str, version: int, weights: LoraWeights, stamp: int) -> int:
        index = self._index_for(weights)
        # From now on the row is nobody's: where writing it fails, it must not serve under the name of before.
        self._held[index] = None
        self._write(index, weights, self._norms.get((name, version), {}))
        self._held[index] = _Held(name, version, next(self._clock), stamp)
        return index

    def _index_for(self, weights: LoraWeights) -> int:
        """A free index, in stacks that have room for an adapter. Where there is no memory for larger ones, those of
        before serve on: each pass would try again to evaluate those that failed."""
        stacks = {name: dict(stack) for name, stack in self._stacks.items()}
        rank, capacity = self._rank, len(self._held)
        try:
            self._widen(weights)
            return self._free_index()
        except Exception:
            self._stacks, self._rank = stacks, rank
            self._held = [*self._held[:capacity], *[None] * (capacity - len(self._held))]
            raise

    def _widen(self, weights: LoraWeights) -> None:
        """Give the stacks the layers, sides and rank that an adapter needs."""
        rank = self._rank
        while rank < weights.config.rank:
            rank *= 2
        new = [(name, side) for name, sides in weights.sides.items() for side in self._missing(name, sides)]
        if rank == self._rank and not new:
            return
        self._rank = rank
        self._give_up_unused(new)
        for name, side in new:
            full = mx.full(self._shape(name, side), _NEUTRAL[side], self._model.decoder.dtype)
            self._stacks.setdefault(name, {})[side] = full
        self._fit()

    def _missing(self, name: str, sides: Set[str]) -> Set[str]:
        """The sides of a layer that an adapter with these matrices needs and the stacks have not."""
        wanted = {"a", "b"} | ({"gain"} if "m" in sides else set())
        if "m" in sides and self._linears[name].bias is not None:
            wanted.add("shift")
        return wanted - self._stacks.get(name, {}).keys()

    def _give_up_unused(self, new: Sequence[tuple[str, str]]) -> None:
        """Before the stacks grow to their rank and to `new` sides: halve the number of their adapters until the budget
        holds them, or an index is in use that would go."""
        sides = [*((name, side) for name, stack in self._stacks.items() for side in stack), *new]
        each = sum(math.prod(self._shape(name, side)[1:]) for name, side in sides) * self._model.decoder.dtype.size
        capacity = len(self._held)
        while capacity > _FIRST_CAPACITY and capacity * each > self._budget and not self._used_from(capacity // 2):
            capacity //= 2
        if capacity < len(self._held):
            del self._held[capacity:]
            for stack in self._stacks.values():
                stack.update({side: mx.contiguous(array[:capacity]) for side, array in stack.items()})

    def _used_from(self, first: int) -> bool:
        return any(self._uses[index] for index in range(first, len(self._held)))

    def _free_index(self) -> int:
        """A free index: one that is free, or a larger stack if the budget allows, or the index of the least recently
        used."""
        while True:
            if None in self._held[1:]:
                return self._held.index(None, 1)
            idle = [index for index in range(1, len(self._held)) if not self._uses[index]]
            if idle and 2 * self.bytes > self._budget:
                return min(idle, key=lambda index: self._held[index].used)  # type: ignore[union-attr]
            self._held += [None] * len(self._held)
            self._fit()

    def _fit(self) -> None:
        """Pad every stack to the rank and the number of adapters: zeros add nothing, gains of 1 change nothing."""
        for name, stack in self._stacks.items():
            for side, array in stack.items():
                shape = self._shape(name, side)
                if array.shape != shape:
                    padding = [(0, wanted - there) for wanted, there in zip(shape, array.shape, strict=True)]
                    stack[side] = mx.pad(array, padding, constant_values=mx.array(_NEUTRAL[side], array.dtype))
        mx.eval(self._stacks)

    def _shape(self, name: str, side: str) -> tuple[int, ...]:
        width_in, width_out = self._linears[name].shape
        shapes = {"a": (width_in, self._rank), "b": (self._rank, width_out)}
        return (len(self._held), *shapes.get(side, (width_out,)))

    def _write(self, index: int, weights: LoraWeights, norms: Mapping[str, mx.array]) -> None:
        """Put an adapter into its row of every stack; layers that it does not change get the neutral row. `norms`: by
        layer, where they are known."""
        dtype = self._model.decoder.dtype
        own = self._sides(weights, norms)
        for name, stack in self._stacks.items():
            sides = own.get(name, {})
            for side, array in stack.items():
                if side not in sides:
                    array[index] = _NEUTRAL[side]
                    continue
                row = sides[side].astype(dtype)
                if row.shape != array.shape[1:]:
                    missing = [(0, wanted - there) for wanted, there in zip(array.shape[1:], row.shape, strict=True)]
                    row = mx.pad(row, missing)
                array[index] = row
        mx.eval(self._stacks)

    def measure(self, name: str, version: int, weights: LoraWeights) -> None:
        """Find the norms of a DoRA adapter before `acquire` needs them: where ranks share the inputs of layers, these
        are sums over all ranks, which do this at the same time. They stay until `drop`. `weights`: whole."""
        if weights.config.dora:
            own = self.own(weights)
            self._norms[name, version] = {layer: self._norms_of(own, layer) for layer in own.matrices}
            mx.eval(self._norms[name, version])

    def _norms_of(self, weights: LoraWeights, layer: str) -> mx.array:
        linear = self._linears[layer]
        if layer not in self._squares:
            self._squares[layer] = square_norms(linear)
        dtype = self._model.decoder.dtype
        return adapted_norms(linear, self._squares[layer], weights.matrices[layer], weights.config.scale, dtype)

    def _sides(self, weights: LoraWeights, norms: Mapping[str, mx.array]) -> Matrices:
        """An adapter's sides as the stacks hold them: of one that came as one array in a few operations, each of which
        is a launch on a GPU, and not in some for each layer. What takes memory is evaluated, before it is in the
        stacks: where there is none for it, each pass would try again to evaluate it."""
        if isinstance(weights.given, Flat) and not weights.config.dora:
            return weights.given.scaled(weights.config.scale, self._model.decoder.dtype)
        found = {layer: self._folded(layer, weights, norms.get(layer)) for layer in weights.matrices}
        mx.eval(found)
        return found

    def _folded(self, layer: str, weights: LoraWeights, norms: mx.array | None) -> dict[str, mx.array]:
        if norms is None and weights.config.dora:
            norms = self._norms_of(weights, layer)
        return folded(weights, layer, self._linears[layer], norms)
