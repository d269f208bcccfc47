"""A rank's part of an adapter, cut as the layers are that it changes."""

from __future__ import annotations

from collections.abc import Container, Sequence

import mlx.core as mx

from engine.adapters.flat import Matrices
from engine.adapters.lora import LoraWeights
from engine.models.shard import Cut, Shard

#: The axis by which a side is cut; those that are not here are whole on each rank.
_AXES: dict[Cut | None, dict[str, int]] = {"outputs": {"b": 1, "m": 0}, "inputs": {"a": 0}}


def axis_of(shard: Shard, name: str, side: str) -> int | None:
    """The axis by which ranks share one side of the adapter of the layer `name`; None: each has the whole."""
    return _AXES.get(shard.cut_of(name), {}).get(side)


def own_part(shard: Shard, name: str, side: str, whole: mx.array) -> mx.array:
    """A rank's part of one side."""
    axis = axis_of(shard, name, side)
    if axis is None:
        return whole
    own = shard.own(whole.shape[axis])
    return whole[own] if axis == 0 else whole[:, own]


def joined_parts(shard: Shard, name: str, side: str, parts: Sequence[mx.array]) -> mx.array:
    """The inverse, of the parts of all ranks of a side that they share."""
    axis = axis_of(shard, name, side)
    assert axis is not None
    return mx.concatenate(list(parts), axis)


def part_of(weights: LoraWeights, shard: Shard, layers: Container[str]) -> LoraWeights:
    """What changes the linear layers that a rank has, `layers` by name. Of one that is cut by its outputs, A whole and
    these columns of B; of one that is cut by its inputs, these rows of A and B whole: the sum over the ranks is in the
    layer's own. Of a whole one, both.
    """
    matrices: Matrices = {
        name: {side: own_part(shard, name, side, whole) for side, whole in sides.items()}
        for name, sides in weights.matrices.items()
        if name in layers
    }
    return LoraWeights(weights.config, matrices)
