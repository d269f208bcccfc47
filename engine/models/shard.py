"""A rank's part of a decoder that several share (tensor parallelism: Shoeybi et al., "Megatron-LM", 2019).

q, k, v, gate and up are cut by their outputs, o and down by their inputs: between the two a rank works alone, and
behind them one sum over all ranks makes the whole. The vocabulary is cut by its rows. Norms are whole on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import mlx.core as mx

from engine.weights.quantized import QuantizedTensor
from engine.weights.tensors import Stored
from stoker.errors import ModelError

Cut: TypeAlias = Literal["outputs", "inputs", "vocabulary"]
#: By the last name of a layer.
CUTS: dict[str, Cut] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "outputs"),
    **dict.fromkeys(("o_proj", "down_proj"), "inputs"),
    **dict.fromkeys(("embed_tokens", "lm_head"), "vocabulary"),
}


class Shard:
    """A `Part`: this rank's of `size` equal ones. What its methods sum, every rank sums at the same time."""

    # What is compiled is kept by what the layers hold: all of them hold the same one of these.
    __slots__ = ("_group", "rank", "size")

    def __init__(self, rank: int, size: int, group: mx.distributed.Group | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    def sum(self, x: mx.array) -> mx.array:
        """The sum over all ranks, on its way; the same bits on each."""
        return mx.distributed.all_sum(x, group=self._group)

    def joined(self, x: mx.array) -> mx.array:
        """What each rank has of the last axis side by side, (…, size · n) of (…, n) each; on its way."""
        *outer, width = x.shape
        found = mx.distributed.all_gather(x[None], group=self._group)
        return mx.moveaxis(found, 0, -2).reshape(*outer, self.size * width)

    def whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(out, …): layers ask for their own part, and for the whole vocabulary."""
        cut = _cut_of(name)
        if cut == "outputs":
            return shape[0] * self.size, *shape[1:]
        return (shape[0], shape[1] * self.size) if cut == "inputs" else shape

    def cut(self, name: str, stored: Stored) -> Stored:
        cut = _cut_of(name)
        if cut is None:
            return stored
        if cut == "inputs":
            return self._columns(name, stored)
        return self._rows(stored, self.rows_of(stored.shape[0]))

    def rows_of(self, count: int) -> int:
        """How many of `count` rows a rank has; the last ones may lack some, and have zeros there."""
        return -(-count // self.size)

    def own(self, width: int) -> slice:
        """This rank's part of an axis that all share evenly."""
        return slice(self.rank * width // self.size, (self.rank + 1) * width // self.size)

    def _rows(self, stored: Stored, each: int) -> Stored:
        rows = slice(self.rank * each, (self.rank + 1) * each)
        if isinstance(stored, mx.array):
            return _filled(stored[rows], each)
        weight, scales = _filled(stored.weight[rows], each), _filled(stored.scales[rows], each)
        biases = None if stored.biases is None else _filled(stored.biases[rows], each)
        return replace(stored, weight=weight, scales=scales, biases=biases)

    def _columns(self, name: str, stored: Stored) -> Stored:
        if isinstance(stored, mx.array):
            return stored[:, self.own(stored.shape[1])]
        width, group = stored.shape[1], stored.form.group_size
        if width // self.size % group:
            raise ModelError(
                f"{name}: {width} inputs in groups of {group} given; over {self.size} ranks a group would be cut. "
                "Use fewer ranks, or a model in smaller groups."
            )
        return _columns_of(stored, self)


def _columns_of(stored: QuantizedTensor, shard: Shard) -> QuantizedTensor:
    weight, scales = (array[:, shard.own(array.shape[1])] for array in (stored.weight, stored.scales))
    biases = None if stored.biases is None else stored.biases[:, shard.own(stored.biases.shape[1])]
    return replace(stored, weight=weight, scales=scales, biases=biases)


def _filled(array: mx.array, rows: int) -> mx.array:
    """With zeros behind, where there are fewer."""
    missing = rows - array.shape[0]
    return mx.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)]) if missing else array


def _cut_of(name: str) -> Cut | None:
    """Of a tensor, such as `model.layers.3.mlp.up_proj.weight`, or of a layer."""
    *_, layer = name.removesuffix(".weight").removesuffix(".bias").split(".")
    return CUTS.get(layer)
