"""A rank's part of an adapter, cut as the layers are that it changes."""

from __future__ import annotations

import mlx.core as mx

from engine.adapters.lora import LoraWeights, Matrices
from engine.models.shard import CUTS, Shard
from stoker.errors import InvalidRequest


def part_of(weights: LoraWeights, shard: Shard) -> LoraWeights:
    """Of a layer that is cut by its outputs, A whole and these columns of B; of one that is cut by its inputs, these
    rows of A and B whole: the sum over the ranks is in the layer's own.

    Raises `InvalidRequest` for DoRA, whose norms are those of whole layers.
    """
    if weights.config.dora:
        raise InvalidRequest(
            "a DoRA adapter given; a model that several ranks share takes LoRA alone. Serve it on a worker without "
            "STOKER_SHARD, or train it with LoRA."
        )
    matrices: Matrices = {name: _cut(name, sides, shard) for name, sides in weights.matrices.items()}
    return LoraWeights(weights.config, matrices)


def _cut(name: str, sides: dict[str, mx.array], shard: Shard) -> dict[str, mx.array]:
    a, b = sides["a"], sides["b"]
    if CUTS[name.rpartition(".")[2]] == "outputs":
        return {"a": a, "b": b[:, shard.own(b.shape[1])]}
    return {"a": a[shard.own(a.shape[0])], "b": b}
