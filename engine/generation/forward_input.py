"""What one pass takes besides keys and values, and how `mx.compile` wants it: arrays apart from what a trace is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from engine.adapters.stacked import StackedLora
from engine.models.joint import JointPlaces


@dataclass(frozen=True, eq=False)
class ForwardInput:
    """`tokens` int32 (rows, many) go through the model, row i's at position `offset[i]` and after it.

    `kv_length`: how many positions are read, a bound for every row. `last`: the index of the token of each row that the
    next one follows; None: the only one. `exact`: one row, whose keys and values this pass fills up to `kv_length`.
    `places`: of the rows, over `JointKeyValues`; else None. `every`: what follows each token is wanted, row after row,
    and not only what follows the last.
    """

    tokens: mx.array
    offset: mx.array
    kv_length: int
    last: mx.array | None = None
    adapters: StackedLora | None = None
    exact: bool = False
    places: JointPlaces | None = None
    every: bool = False


class _Record(NamedTuple):
    kind: type
    parts: tuple[Any, ...]


#: Where an array or a list of them, and where a batch's adapters stood.
_ARRAY, _ADAPTERS = object(), object()
#: Leaves that a trace is for as they are.
_PLAIN = frozenset({type(None), bool, int, float, str})


def flatten(tree: Any, arrays: list[Any], key: list[Any]) -> None:
    """Append the arrays of a tree of frozen dataclasses to `arrays`; to `key` what a trace is for: the shapes and
    everything else. Runs before every pass, so it makes no objects of its own, and no call for a leaf."""
    key.append(type(tree))
    for part in tree.__dict__.values():
        kind = type(part)
        if kind is mx.array:
            arrays.append(part)
            key.append(part.shape)
        elif kind in _PLAIN:
            key.append(part)
        elif kind is list:
            # Weights: what they are for says their shapes.
            arrays.append(part)
        elif kind is StackedLora:
            # A dictionary of hundreds of arrays: MLX walks it faster than Python. All stacks have room for the same
            # adapters and rank: the first and their number say it all.
            arrays.append((part.stacks, part.indices))
            key += next(iter(part.stacks.values()))["a"].shape[::2], sum(map(len, part.stacks.values()))
        else:
            flatten(part, arrays, key)


def skeleton(value: Any) -> Any:
    """`value` without its arrays, for `filled`: a trace keeps it, and must not keep arrays."""
    if isinstance(value, mx.array | list):
        return _ARRAY
    if isinstance(value, StackedLora):
        return _ADAPTERS
    if is_dataclass(value):
        return _Record(type(value), tuple(map(skeleton, vars(value).values())))
    return value


def filled(shape: Any, arrays: Iterator[Any]) -> Any:
    """The value of a skeleton, with the arrays that `flatten` took out of it."""
    if shape is _ARRAY:
        return next(arrays)
    if shape is _ADAPTERS:
        return StackedLora(*next(arrays))
    if isinstance(shape, _Record):
        return shape.kind(*(filled(part, arrays) for part in shape.parts))
    return shape
