"""A rank's part of an adapter, cut as the layers are that it changes."""

from __future__ import annotations

from collections.abc import Container

import mlx.core as mx

from engine.adapters.lora import LoraWeights, Matrices
from engine.models.shard import Shard
from stoker.errors import InvalidRequest


def part_of(weights: LoraWeights, shard: Shard, layers: Container[str]) -> LoraWeights:
    """What changes the linear layers that a rank has, `layers` by name. Of one that is cut by its outputs, A whole and
    these columns of B; of one that is cut by its inputs, these rows of A and B whole: the sum over the ranks is in the
    layer's own. Of a whole one, both.

    Raises `InvalidRequest` for DoRA where layers are cut: its norms are those of whole ones.
    """
    if weights.config.dora and shard.split == "heads":
        raise InvalidRequest(
            "a DoRA adapter given; a model whose heads several ranks share takes LoRA alone. Serve it on a worker "
            "without STOKER_SHARD, or train it with LoRA."
        )
    own = {name: sides for name, sides in weights.matrices.items() if name in layers}
    matrices: Matrices = {name: _cut(name, sides, shard) for name, sides in own.items()}
    return LoraWeights(weights.config, matrices)


def _cut(name: str, sides: dict[str, mx.array], shard: Shard) -> dict[str, mx.array]:
    cut, a, b = shard.cut_of(name), sides["a"], sides["b"]
    if cut == "outputs":
        return {"a": a, "b": b[:, shard.own(b.shape[1])]}
    return {"a": a[shard.own(a.shape[0])], "b": b} if cut == "inputs" else sides
