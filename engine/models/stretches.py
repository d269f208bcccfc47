"""Layers of a decoder in a row, of which those that compute alike share what is compiled of one of them.

Compiling a pass over 24 layers as one function takes MLX some 30 ms, four fifths of it in C++ that holds the
interpreter's lock, so that every stream waits, in any thread. A sixth of the layers takes a sixth of it, and as their
weights are arguments it serves the others too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias

import mlx.core as mx

from engine.models.joint import Cache, together
from engine.models.key_values import Stored
from engine.models.layers import LayerAdapters, Linear, Sum, Update, adapted

#: Hidden states, and what is to be added to them: (B, T, dim) each, or (B, dim) of one new token a row.
Hidden: TypeAlias = tuple[mx.array, mx.array]


def without_tokens(x: mx.array) -> mx.array:
    """Hidden states of one new token a row, (B, 1, dim), as (B, dim).

    MLX flattens the input of each product of three dimensions, and unflattens what it makes: eight operations of a
    layer that launch nothing, and that each pass walks all the same.
    """
    return x[:, 0]


#: Attributes that distinguish layers, and nothing that they compute.
_OWN = ("name", "index")


class Layer(Protocol):
    @property
    def linears(self) -> Sequence[Linear]: ...
    def forward(self, x: mx.array, update: Update, cache: Cache | None, adapters: LayerAdapters | None) -> Sum: ...


class Stretch:
    """`index`: the number of the stretch; `first`: of its first layer.

    `form`: what the layers compute, except for the numbers in `weights`. `pattern`: the stretch of this form that is
    traced.
    """

    def __init__(self, index: int, first: int, layers: Sequence[Layer]) -> None:
        self.index, self.first, self._layers = index, first, layers
        found = _Found()
        found.visit(layers)
        self._slots = found.slots
        self.form: Hashable = tuple(found.form)
        self.weights: list[mx.array] = [getattr(owner, name) for owner, name in self._slots]
        self.pattern = self
        #: The names of all linear layers.
        self.linears = [linear.name for layer in layers for linear in layer.linears]

    def place(self, *, joint: bool) -> slice:
        """Where the arrays of these layers are among those of all. `joint`: they share one."""
        first, count = (self.index, 1) if joint else (self.first, len(self._layers))
        return slice(first, first + count)

    def stored(self, stored: Stored, *, joint: bool) -> Stored:
        """What is stored of these layers."""
        keys, values, _ = stored
        place = self.place(joint=joint)
        return keys[place], values[place], []

    def forward(
        self, hidden: Hidden, weights: Sequence[mx.array], cache: Cache, adapters: LayerAdapters | None
    ) -> Hidden:
        """The layers with these weights, which may be another's of this form."""
        with self._given(weights):
            behind: Sum = hidden
            for layer in self._layers:
                behind = layer.forward(*behind, cache, adapters)
        x, update = behind
        return x, adapted(update)

    @contextmanager
    def _given(self, weights: Sequence[mx.array]) -> Iterator[None]:
        self._set(weights)
        try:
            yield
        finally:
            self._set(self.weights)

    def _set(self, weights: Sequence[mx.array]) -> None:
        for (owner, name), weight in zip(self._slots, weights, strict=True):
            object.__setattr__(owner, name, weight)


class Stretches(NamedTuple):
    """A decoder in parts, from tokens to what its last norm gives."""

    begin: Callable[[mx.array], Hidden]
    parts: Sequence[Stretch]
    end: Callable[[Hidden], mx.array]


def in_parts(layers: Sequence[Layer]) -> list[Stretch]:
    """All layers, as many together as share an array of `JointKeyValues`; one pattern for all of one form."""
    parts = together(len(layers))
    made = [Stretch(index, part.start, layers[part.start : part.stop]) for index, part in enumerate(parts)]
    patterns: dict[Hashable, Stretch] = {}
    for stretch in made:
        stretch.pattern = patterns.setdefault(stretch.form, stretch)
    return made


class _Found:
    """Where the arrays of a tree of objects are, and all else that it holds."""

    def __init__(self) -> None:
        self.slots: list[tuple[Any, str]] = []
        self.form: list[Any] = []
        self._seen: dict[int, int] = {}

    def visit(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            self.form.append(len(value))
            for part in value:
                self.visit(part)
        elif not hasattr(value, "__dict__"):
            self.form.append(value)
        elif id(value) in self._seen:
            self.form.append(self._seen[id(value)])
        else:
            self._seen[id(value)] = len(self._seen)
            self.form.append(type(value))
            for name, part in vars(value).items():
                self._visit_part(value, name, part)

    def _visit_part(self, owner: Any, name: str, part: Any) -> None:
        if isinstance(part, mx.array):
            self.slots.append((owner, name))
            self.form.append((name, part.shape, part.dtype))
        elif name not in _OWN:
            self.form.append(name)
            self.visit(part)
