"""A rank's part of a decoder that several share.

By heads (tensor parallelism: Shoeybi et al., "Megatron-LM", 2019): q, k, v, gate and up are cut by their outputs, o and
down by their inputs; between the two a rank works alone, and behind them one sum over all ranks makes the whole. By
layers (pipeline parallelism: Huang et al., "GPipe", 2019): each rank has whole layers, which run one rank after the
other. Either way the vocabulary is cut by its rows, and norms outside of layers are whole on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, Self, TypeAlias, cast

import mlx.core as mx

from engine.weights.quantized import QuantizedTensor
from engine.weights.tensors import Stored
from stoker.errors import ModelError

Cut: TypeAlias = Literal["outputs", "inputs", "vocabulary"]
#: How ranks share a model.
Split: TypeAlias = Literal["heads", "layers"]
#: What each split cuts, by the last name of a layer.
_VOCABULARY: dict[str, Cut] = dict.fromkeys(("embed_tokens", "lm_head"), "vocabulary")
_CUTS: dict[Split, Mapping[str, Cut]] = {
    "heads": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "outputs"),
        **dict.fromkeys(("o_proj", "down_proj"), "inputs"),
        **_VOCABULARY,
    },
    "layers": _VOCABULARY,
}


class Shard:
    """A `Part`: this rank's of `size` ones, by heads. What its methods sum, every rank sums at the same time."""

    # What is compiled is kept by what the layers hold: all of them hold the same one of these.
    __slots__ = ("_group", "rank", "size", "split")

    def __init__(self, rank: int, size: int, group: mx.distributed.Group | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group
        self.split: Split = "heads"

    def by_layers(self) -> Self:
        """The same rank where layers are whole."""
        made = copy.copy(self)
        made.split = "layers"
        return made

    def sum(self, x: mx.array) -> mx.array:
        """The sum over all ranks, on its way; the same bits on each. Its gradient goes to every rank as it is."""
        return mx.distributed.all_sum(x, group=self._group)

    def spread(self, x: mx.array) -> mx.array:
        """`x`, whole on each rank, as the input of layers of which each rank has its outputs: as it is, with the sum of
        the ranks' gradients as its own. With `sum` these are f and g of Shoeybi et al."""

        @mx.custom_function
        def same(x: mx.array) -> mx.array:
            return x

        @same.vjp
        def _(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            return self.sum(cotangent)

        return cast("mx.array", same(x))

    def joined(self, x: mx.array) -> mx.array:
        """What each rank has of the last axis side by side, (…, size · n) of (…, n) each; on its way."""
        *outer, width = x.shape
        found = mx.distributed.all_gather(x[None], group=self._group)
        return mx.moveaxis(found, 0, -2).reshape(*outer, self.size * width)

    def of_rank(self, rank: int, x: mx.array, anchor: mx.array | None = None) -> mx.array:
        """What one rank has, on all of them; on its way. The others give any array of its shape and type, behind which
        they exchange this one: so all make their exchanges in the same order.

        `anchor`: a number of what is trained, where ranks call this one after the other with what comes next of x. Then
        the gradient goes back the same way, from the rank that went on from here to this one. All take part in that,
        also those that trained nothing before: the anchor's gradient, which is zero, comes behind it.
        """
        if anchor is None:
            return self._given_by(rank, x)

        @mx.custom_function
        def exchanged(x: mx.array, anchor: mx.array) -> mx.array:
            return self._given_by(rank, x)

        @exchanged.vjp
        def _(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
            # Behind the last rank all compute the same, and each has the whole gradient.
            back = cotangent if rank == self.size - 1 else self.sum(cotangent)
            nothing, none = (mx.depends(mx.zeros_like(primal), back) for primal in primals)
            return (back if rank == self.rank else nothing), none

        return cast("mx.array", exchanged(x, anchor))

    def _given_by(self, rank: int, x: mx.array) -> mx.array:
        return self.sum(x if rank == self.rank else mx.depends(mx.zeros_like(x), x))

    def whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(out, …): layers ask for their own part, and for the whole vocabulary."""
        cut = self.cut_of(name)
        if cut == "outputs":
            return shape[0] * self.size, *shape[1:]
        return (shape[0], shape[1] * self.size) if cut == "inputs" else shape

    def cut(self, name: str, stored: Stored) -> Stored:
        cut = self.cut_of(name)
        if cut is None:
            return stored
        if cut == "inputs":
            return self._columns(name, stored)
        return self._rows(stored)

    def rows_of(self, count: int) -> int:
        """How many of `count` rows a rank has; the last ones may lack some, and have zeros there."""
        return -(-count // self.size)

    def own(self, width: int) -> slice:
        """This rank's part of an axis, or of so many layers: as many as the others have, or one less."""
        return slice(self.rank * width // self.size, (self.rank + 1) * width // self.size)

    def cut_of(self, name: str) -> Cut | None:
        """Of a tensor, such as `model.layers.3.mlp.up_proj.weight`, or of a layer; None: it is whole."""
        *_, layer = name.removesuffix(".weight").removesuffix(".bias").split(".")
        return _CUTS[self.split].get(layer)

    def vocabulary(self, array: mx.array) -> mx.array:
        """This rank's rows of an array that has one for each id: `rows_of` of them, with zeros where there are fewer;
        on its way."""
        each = self.rows_of(array.shape[0])
        own = array[self.rank * each : (self.rank + 1) * each]
        missing = each - own.shape[0]
        # A slice alone would keep the whole in memory.
        return mx.pad(own, [(0, missing), *[(0, 0)] * (own.ndim - 1)]) if missing else mx.contiguous(own)

    def _rows(self, stored: Stored) -> Stored:
        return self.vocabulary(stored) if isinstance(stored, mx.array) else _each(self.vocabulary, stored)

    def _columns(self, name: str, stored: Stored) -> Stored:
        if isinstance(stored, mx.array):
            return self._own_columns(stored)
        width, group = stored.shape[1], stored.form.group_size
        if width // self.size % group:
            raise ModelError(
                f"{name}: {width} inputs in groups of {group} given; over {self.size} ranks a group would be cut. "
                "Use fewer ranks, or a model in smaller groups."
            )
        return _each(self._own_columns, stored)

    def _own_columns(self, array: mx.array) -> mx.array:
        return mx.contiguous(array[:, self.own(array.shape[1])])


def _each(cut: Callable[[mx.array], mx.array], stored: QuantizedTensor) -> QuantizedTensor:
    biases = None if stored.biases is None else cut(stored.biases)
    return replace(stored, weight=cut(stored.weight), scales=cut(stored.scales), biases=biases)
