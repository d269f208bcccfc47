"""The Llama family over several ranks: each has its heads of attention, its part of each MLP and of the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from engine.models.layers import Embedding, LayerAdapters, Linear, RowAdapters
from engine.models.llama import Llama, LlamaArgs
from engine.models.shard import Shard
from engine.weights.tensors import Tensors
from kernels.lora import LoraInput, lora
from stoker.errors import ModelError


class SummedLinear(Linear):
    """A layer of which each rank has a part of the inputs. What adapters add is in the sum: they are cut alike."""

    def __init__(self, own: Linear, shard: Shard) -> None:
        self.name, self.bias, self._own, self._shard = own.name, own.bias, own, shard

    def __call__(self, x: mx.array, adapters: LayerAdapters | None = None) -> mx.array:
        return self._shard.sum(self._own(x, adapters))

    def unadapted(self, x: mx.array, adapters: RowAdapters | None) -> mx.array:
        update = self._own.unadapted(x, adapters)
        return self._shard.sum(lora(update) if isinstance(update, LoraInput) else update)

    @property
    def shape(self) -> tuple[int, int]:
        return self._own.shape

    def dense(self) -> mx.array:
        return self._own.dense()


class SharedEmbedding(Embedding):
    """A table of which each rank has as many rows: the rank that has an id's row gives it, the others zeros."""

    def __init__(self, own: Embedding, rows: int, shard: Shard) -> None:
        self._own, self._rows, self._shard = own, rows, shard

    def __call__(self, ids: mx.array) -> mx.array:
        ids = ids - self._shard.rank * self._rows
        here = (ids >= 0) & (ids < self._rows)
        found = self._own(mx.where(here, ids, 0))
        return self._shard.sum(mx.where(here[..., None], found, mx.zeros((), found.dtype)))

    def as_linear(self, x: mx.array) -> mx.array:
        """This rank's columns alone."""
        return self._own.as_linear(x)

    @property
    def dtype(self) -> mx.Dtype:
        return self._own.dtype


class ShardedLlama(Llama):
    """This rank's part, which all ranks run at the same time. Hidden states and logits are whole on each."""

    def __init__(self, args: LlamaArgs, tensors: Tensors, shard: Shard) -> None:
        tensors.part = shard
        super().__init__(_own_part(args, shard), tensors)
        self.shard = shard
        self.embed_tokens = SharedEmbedding(self.embed_tokens, shard.rows_of(args.vocab), shard)
        for layer in self.layers:
            layer.self_attn.o_proj = SummedLinear(layer.self_attn.o_proj, shard)
            layer.mlp.down_proj = SummedLinear(layer.mlp.down_proj, shard)

    def head(self, hidden: mx.array) -> mx.array:
        return self.shard.joined(super().head(hidden))[..., : self.args.vocab]

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the whole layers: those of an adapter."""
        found = {}
        for name, linear in self.linears.items():
            inputs, outputs = linear.shape
            outputs, inputs = self.shard.whole(name, (outputs, inputs))
            found[name] = inputs, outputs
        return found


def _own_part(args: LlamaArgs, shard: Shard) -> LlamaArgs:
    """Raises `ModelError` for sizes that cannot be cut evenly."""
    sizes = {"heads": args.heads, "key/value heads": args.kv_heads, "hidden units of the MLP": args.hidden}
    for name, size in sizes.items():
        if size % shard.size:
            fitting = [ranks for ranks in range(1, 65) if all(each % ranks == 0 for each in sizes.values())]
            raise ModelError(
                f"{size} {name} over {shard.size} ranks given; each rank needs as many as the others. "
                f"{', '.join(map(str, fitting))} ranks can share this model."
            )
    return replace(
        args, heads=args.heads // shard.size, kv_heads=args.kv_heads // shard.size, hidden=args.hidden // shard.size
    )
