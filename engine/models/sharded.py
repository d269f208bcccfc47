"""The Llama family over several ranks: each has its heads of attention and its part of each MLP, or whole layers."""

from __future__ import annotations

import logging
from dataclasses import replace

import mlx.core as mx

from engine.models.kv_sizes import KvSizes
from engine.models.layers import Embedding, LayerAdapters, Linear, RMSNorm, RowAdapters, Sum, summed
from engine.models.llama import Llama, LlamaArgs
from engine.models.shard import Shard
from engine.weights.tensors import Tensors
from kernels.lora import LoraInput, lora
from stoker.errors import ModelError

log = logging.getLogger(__name__)


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

    def total(self, found: mx.array) -> mx.array:
        return self._shard.sum(found)


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


class SpreadNorm(RMSNorm):
    """A norm behind which each rank goes on with its own outputs."""

    def __init__(self, norm: RMSNorm, shard: Shard) -> None:
        super().__init__(norm.weight, norm.eps)
        self._shard = shard

    def __call__(self, x: mx.array) -> mx.array:
        return self._shard.spread(super().__call__(x))

    def frozen(self, x: mx.array) -> mx.array:
        return self._shard.spread(super().frozen(x))


class SharedLlama(Llama):
    """This rank's part, with its rows of the vocabulary. Hidden states and logits are whole on each rank.

    `args`: of what this rank has of each layer; `own`: its layers.
    """

    shard: Shard

    def __init__(self, args: LlamaArgs, tensors: Tensors, shard: Shard, own: range) -> None:
        tensors.part = shard
        super().__init__(args, tensors, own)
        self.shard: Shard = shard
        self.embed_tokens = SharedEmbedding(self.embed_tokens, shard.rows_of(args.vocab), shard)

    def head(self, hidden: mx.array) -> mx.array:
        return self.shard.joined(super().head(hidden))[..., : self.args.vocab]

    def own_logits(self, hidden: mx.array) -> mx.array:
        # The last columns of the last ranks may stand for no token: they have a logit of 0.
        return super().head(self.shard.spread(hidden)).astype(mx.float32)


class HeadsLlama(SharedLlama):
    """A rank's heads, and its part of each MLP. All ranks run them at the same time."""

    def __init__(self, args: LlamaArgs, tensors: Tensors, shard: Shard) -> None:
        heads, kv_heads, hidden = (size // shard.size for size in (args.heads, args.kv_heads, args.hidden))
        own = replace(args, heads=heads, kv_heads=kv_heads, hidden=hidden)
        super().__init__(own, tensors, shard, range(args.layers))
        for layer in self.layers:
            layer.self_attn.o_proj = SummedLinear(layer.self_attn.o_proj, shard)
            layer.mlp.down_proj = SummedLinear(layer.mlp.down_proj, shard)
            layer.input_layernorm = SpreadNorm(layer.input_layernorm, shard)
            layer.post_attention_layernorm = SpreadNorm(layer.post_attention_layernorm, shard)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the whole layers: those of an adapter."""
        found = {}
        for name, linear in self.linears.items():
            inputs, outputs = linear.shape
            outputs, inputs = self.shard.whole(name, (outputs, inputs))
            found[name] = inputs, outputs
        return found


class LayersLlama(SharedLlama):
    """A rank's layers, which run when those of the ranks before it have."""

    def __init__(self, args: LlamaArgs, tensors: Tensors, shard: Shard) -> None:
        shard = shard.by_layers()
        own = range(args.layers)[shard.own(args.layers)]
        others = tuple(f"model.layers.{index}." for index in range(args.layers) if index not in own)
        tensors.leave(lambda name: name.startswith(others) and not self.unused(name))
        super().__init__(args, tensors, shard, own)

    @property
    def kv_sizes(self) -> KvSizes:
        sizes = super().kv_sizes
        most = self.shard.rows_of(self.args.layers)
        return sizes._replace(counted=(most * (sizes.keys[0].nbytes + sizes.values[0].nbytes), 0))

    def _before(self, tokens: mx.array, anchor: mx.array | None = None) -> mx.array:
        """What this rank's first layer takes: what the ranks before it made of the tokens."""
        x = self.embed_tokens(tokens)
        for rank in range(self.shard.rank):
            x = self.shard.of_rank(rank, x, anchor)
        return x

    def _behind(self, x: mx.array, anchor: mx.array | None = None) -> mx.array:
        """What the last rank's last layer makes of what this rank's made."""
        for rank in range(self.shard.rank, self.shard.size):
            x = self.shard.of_rank(rank, x, anchor)
        return x

    def _end(self, hidden: Sum, anchor: mx.array | None = None, *, fused: bool = True) -> mx.array:
        return self.norm(self._behind(summed(*hidden), anchor))

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the layers of all ranks: those of an adapter."""
        first, *_ = self.layers
        shapes = {linear.name.split(".", 2)[2]: linear.shape for linear in first.linears}
        layers = range(self.args.layers)
        return {f"layers.{index}.{part}": shape for index in layers for part, shape in shapes.items()}


def shared(args: LlamaArgs, tensors: Tensors, shard: Shard) -> SharedLlama:
    """This rank's part: by heads where they divide, else by layers. Raises `ModelError` where neither is possible."""
    why_not = _why_not_by_heads(args, tensors, shard.size)
    if not why_not:
        return HeadsLlama(args, tensors, shard)
    if args.layers < shard.size:
        raise ModelError(
            f"{why_not} and {args.layers} layers given; each rank needs as many of the former as the others, or a "
            f"layer. {_fitting(args)} can share this model."
        )
    log.info("the ranks share its layers: %s do not divide", why_not)
    return LayersLlama(args, tensors, shard)


def _sizes(args: LlamaArgs) -> dict[str, int]:
    """What each rank has as much of as the others, by heads."""
    return {"heads": args.heads, "key/value heads": args.kv_heads, "hidden units of the MLP": args.hidden}


def _fitting(args: LlamaArgs) -> str:
    """For people: how many ranks can share a model."""
    more = [ranks for ranks in range(args.layers + 1, 65) if not any(size % ranks for size in _sizes(args).values())]
    return ", ".join([f"Up to {args.layers}", *map(str, more)]) + " ranks"


def _why_not_by_heads(args: LlamaArgs, tensors: Tensors, ranks: int) -> str:
    """What cannot be cut evenly; "": all can."""
    for name, size in _sizes(args).items():
        if size % ranks:
            return f"{size} {name} over {ranks} ranks"
    for index in range(args.layers):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{part}.weight"
            if not tensors.keeps_groups(name, ranks):
                return f"the groups of the quantized {name} over {ranks} ranks"
    return ""
