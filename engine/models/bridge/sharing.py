"""A network of mlx-lm's of which each rank has some layers, and its rows of the vocabulary.

A network calls its layers one after the other, on every rank: those of other ranks give what they are given, and behind
the last one of a rank all have what that gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.bridge.blocks import Stage, StandIn, layer_lists
from engine.models.bridge.linears import Pass
from engine.models.shard import Shard
from stoker.errors import ModelError

_WITHOUT = "Serve it without STOKER_SHARD."


class NotedLayer(StandIn):
    """A layer that says when it runs. Raises `ModelError` where another layer could not go on from what it gives."""

    def __init__(self, layer: nn.Module, number: int, under_way: Pass) -> None:
        super().__init__(layer)
        self._number, self._pass = number, under_way

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._pass.layer = self._number
        made = self["layer"](*args, **keywords)
        self._pass.layer = None
        if not (args and isinstance(made, mx.array) and _alike(args[0], made)):
            raise ModelError(f"its layers hand on more than hidden states, so ranks cannot share them. {_WITHOUT}")
        return made


def _alike(given: Any, made: mx.array) -> bool:
    return isinstance(given, mx.array) and (given.shape, given.dtype) == (made.shape, made.dtype)


class SharedLayer(StandIn):
    """A layer of this rank or of another. `after`: the rank whose last layer it is; None: it is no rank's last."""

    def __init__(self, layer: nn.Module, shard: Shard, under_way: Pass, *, own: bool, after: int | None) -> None:
        super().__init__(layer)
        self._shard, self._pass, self._own, self._after = shard, under_way, own, after

    def __call__(self, x: mx.array, *args: Any, **keywords: Any) -> mx.array:
        if self._own:
            x = self["layer"](x, *args, **keywords)
        if self._after is None:
            return x
        adapters = self._pass.adapters
        return self._shard.of_rank(self._after, x, None if adapters is None else adapters.anchor)


class SharedTable(StandIn):
    """An embedding of which each rank has as many rows, as `engine.models.sharded.SharedEmbedding`."""

    def __init__(self, table: nn.Module, rows: int, shard: Shard, under_way: Pass) -> None:
        super().__init__(table)
        self._rows, self._shard, self._pass = rows, shard, under_way

    def __call__(self, ids: mx.array) -> mx.array:
        each = self._shard.rows_of(self._rows)
        ids = ids - self._shard.rank * each
        here = (ids >= 0) & (ids < each)
        found = self["layer"](mx.where(here, ids, 0))
        return self._shard.sum(mx.where(here[..., None], found, mx.zeros((), found.dtype)))

    def as_linear(self, x: mx.array) -> mx.array:
        return _columns(self["layer"].as_linear(x), self._rows, self._shard, self._pass)


class SharedHead(StandIn):
    """A linear layer of which each rank has as many outputs; all get all of them."""

    def __init__(self, head: nn.Module, rows: int, shard: Shard, under_way: Pass) -> None:
        super().__init__(head)
        self._rows, self._shard, self._pass = rows, shard, under_way

    def __call__(self, x: mx.array) -> mx.array:
        return _columns(self["layer"](x), self._rows, self._shard, self._pass)


def _columns(own: mx.array, count: int, shard: Shard, under_way: Pass) -> mx.array:
    """The `count` of all ranks, unless the pass under way wants those of this one."""
    return own if under_way.own_columns else shard.joined(own)[..., :count]


@contextmanager
def noted(network: nn.Module, under_way: Pass) -> Iterator[None]:
    """Inside, each layer says when it runs."""
    found = list(layer_lists(network))
    if not found:
        raise ModelError(f"its layers are in no list of mlx-lm's file, so ranks cannot share them. {_WITHOUT}")
    for module, name, layers in found:
        module[name] = [NotedLayer(layer, number, under_way) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for module, name, layers in found:
            module[name] = layers


def parts_of(network: nn.Module, shard: Shard) -> list[range]:
    """The layers of each rank. Raises `ModelError` where there are too few."""
    count, ranks = len(network.layers), shard.size
    if count < ranks:
        raise ModelError(
            f"{count} layers over {ranks} ranks given; each rank needs one. Up to {count} ranks can share this model."
        )
    return [range(rank * count // ranks, (rank + 1) * count // ranks) for rank in range(ranks)]


def others(network: nn.Module, shard: Shard) -> tuple[str, ...]:
    """How the names of the tensors begin that other ranks have. Raises `ModelError` as `parts_of`."""
    own = parts_of(network, shard)[shard.rank]
    elsewhere = {id(layer) for number, layer in enumerate(network.layers) if number not in own}
    return tuple(f"{path}." for path, module in network.named_modules() if id(module) in elsewhere)


def share(network: nn.Module, vocab: int, parts: Sequence[range], shard: Shard, under_way: Pass) -> None:
    """Leave a rank its layers, and its rows of the vocabulary, before any of it is evaluated."""
    for path, module in network.named_modules():
        if not any(part.isdigit() for part in path.split(".")):
            _share_vocabulary(module, vocab, shard, under_way)
    own, after = parts[shard.rank], {part[-1]: rank for rank, part in enumerate(parts)}
    for module, name, layers in list(layer_lists(network)):
        for number, layer in enumerate(layers):
            if number not in own:
                _empty(layer)
        # A trainer runs the layers of this rank alone in its own way, and exchanges nothing when it runs them again.
        module[name] = [
            SharedLayer(Stage(layer, under_way), shard, under_way, own=number in own, after=after.get(number))
            for number, layer in enumerate(layers)
        ]


def _share_vocabulary(module: nn.Module, vocab: int, shard: Shard, under_way: Pass) -> None:
    """Of the parts of a module, those that have a row for each id."""
    for name, part in list(module.items()):
        table = isinstance(part, nn.Embedding | nn.QuantizedEmbedding)
        if not (table or isinstance(part, nn.Linear | nn.QuantizedLinear)) or part["weight"].shape[0] != vocab:
            continue
        for side, array in list(part.items()):
            if isinstance(array, mx.array):
                part[side] = shard.vocabulary(array)
        module[name] = (SharedTable if table else SharedHead)(part, vocab, shard, under_way)


def _empty(layer: nn.Module) -> None:
    """Let go of the arrays of a layer, which another rank has. What it says of itself stays: networks ask for it."""
    for part in layer.modules():
        for name in [name for name, value in part.items() if isinstance(value, mx.array)]:
            del part[name]
