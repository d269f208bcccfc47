"""The adapters of one model that are in memory, stacked so that one batch can mix them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import mlx.core as mx

from engine.adapters.lora import LoraWeights, Matrices, StackedLora
from engine.adapters.store import AdapterStore
from engine.loading import LoadedModel

#: The index of the bare base in every stack.
BASE = 0


class AdapterPool:
    """Loads adapters on first use and hands out their index in the stacks.

    A request holds the version it started with: a newer one gets an index of its own, and the old index is taken up
    again only when nobody uses it any more. All but `check` and `loaded` run in the engine's thread.
    """

    def __init__(self, model: LoadedModel, store: AdapterStore) -> None:
        self._model, self._store = model, store
        #: index − 1 → (name, version, weights); None is a hole.
        self._held: list[tuple[str, int, LoraWeights] | None] = []
        self._uses: Counter[int] = Counter()
        self._stacks: Matrices = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(f"{entry[0]}@{entry[1]}" for entry in list(self._held) if entry)

    def check(self, name: str) -> None:
        """Raise `UnknownAdapter` unless the store has it. From any thread."""
        self._store.resolve(self._model.name, name)

    def acquire(self, name: str | None) -> int:
        """The index of the newest version of `name` (None: the base), to be given back by `release`."""
        index = BASE if name is None else self._index_of(name)
        self._uses[index] += 1
        return index

    def release(self, index: int) -> None:
        self._uses[index] -= 1

    def save(self, name: str, weights: LoraWeights, notes: Mapping[str, object], version: int | None = None) -> int:
        """Write a trained adapter as a version, by default the next one, and hold it."""
        version = self._store.write(self._model.name, name, weights, notes, version)
        self._hold(name, version, weights)
        return version

    def rows(self, indices: Sequence[int]) -> StackedLora | None:
        """What the forward pass of a batch needs, one index a row; None if all rows are the bare base."""
        if all(index == BASE for index in indices):
            return None
        return StackedLora(self._stacks, mx.array(list(indices), dtype=mx.uint32))

    def _index_of(self, name: str) -> int:
        name, version = self._store.resolve(self._model.name, name)
        for place, entry in enumerate(self._held):
            if entry and entry[:2] == (name, version):
                return place + 1
        weights = self._store.read(self._model.name, name, version, self._model.linear_shapes)
        return self._hold(name, version, weights)

    def _hold(self, name: str, version: int, weights: LoraWeights) -> int:
        for place, entry in enumerate(self._held):
            if entry and entry[0] == name and not self._uses[place + 1]:
                self._held[place] = None
        entry = (name, version, weights)
        if None in self._held:
            place = self._held.index(None)
            self._held[place] = entry
        else:
            place = len(self._held)
            self._held.append(entry)
        self._stacks = self._stack()
        return place + 1

    def _stack(self) -> Matrices:
        """Stack all adapters a layer, ranks padded with zeros to the largest: zero columns add nothing."""
        held = [entry[2] if entry else None for entry in self._held]
        rank = max(weights.config.rank for weights in held if weights)
        names = {name for weights in held if weights for name in weights.matrices}
        stacks: Matrices = {}
        for name in names:
            width_in, width_out = self._model.linear_shapes[name]
            empty = mx.zeros((width_in, rank)), mx.zeros((rank, width_out))
            pairs = [empty, *(_padded(weights, name, rank) or empty for weights in held)]
            stacks[name] = {"a": mx.stack([a for a, _ in pairs]), "b": mx.stack([b for _, b in pairs])}
        mx.eval(stacks)
        return stacks


def _padded(weights: LoraWeights | None, name: str, rank: int) -> tuple[mx.array, mx.array] | None:
    if weights is None or name not in weights.matrices:
        return None
    pair, missing = weights.matrices[name], rank - weights.config.rank
    a = mx.pad(pair["a"].astype(mx.float32), [(0, 0), (0, missing)])
    b = mx.pad(pair["b"].astype(mx.float32) * weights.config.scale, [(0, missing), (0, 0)])
    return a, b
