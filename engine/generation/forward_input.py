"""What one pass takes besides keys and values, and how `mx.compile` wants it: arrays apart from what a trace is for."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from engine.adapters.stacked import StackedLora


@dataclass(frozen=True, eq=False)
class ForwardInput:
    """`tokens` int32 (rows, many) go through the model, row i's at position `offset[i]` and after it.

    `kv_length`: how many positions are read, a bound for every row. `last`: the index of the token of each row that the
    next one follows; None: the only one. `exact`: one row, whose keys and values this pass fills up to `kv_length`.
    """

    tokens: mx.array
    offset: mx.array
    kv_length: int
    last: mx.array | None = None
    adapters: StackedLora | None = None
    exact: bool = False


class _Array(NamedTuple):
    shape: tuple[int, ...]


class _Adapters(NamedTuple):
    """All stacks have room for the same adapters and rank: the first and their number say it all."""

    room: tuple[int, ...]
    arrays: int


class _Record(NamedTuple):
    kind: type
    parts: tuple[Hashable, ...]


def flatten(value: Any, arrays: list[Any]) -> Hashable:
    """Append the arrays of `value`, a tree of frozen dataclasses. Return what the trace is for: the tree with shapes
    in the place of arrays."""
    if isinstance(value, mx.array):
        arrays.append(value)
        return _Array(tuple(value.shape))
    if isinstance(value, StackedLora):
        # A dictionary of hundreds of arrays: MLX walks it faster than Python.
        arrays.append((value.stacks, value.indices))
        return _Adapters(next(iter(value.stacks.values()))["a"].shape[::2], sum(map(len, value.stacks.values())))
    if is_dataclass(value):
        return _Record(type(value), tuple(flatten(part, arrays) for part in vars(value).values()))
    assert isinstance(value, Hashable)
    return value


def unflatten(layout: Hashable, arrays: Iterator[Any]) -> Any:
    """The value that `flatten` took apart, with `arrays` for its arrays."""
    match layout:
        case _Array():
            return next(arrays)
        case _Adapters():
            return StackedLora(*next(arrays))
        case _Record(kind, parts):
            return kind(*(unflatten(part, arrays) for part in parts))
    return layout
