"""What the sentence encoders share: the post-norm Transformer block (Vaswani et al., 2017) with exact GELU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from engine.models.attention import Mask, attention
from engine.models.fastmath import gelu
from engine.models.fields import Fields
from engine.models.layers import LayerNorm, Linear
from engine.weights.tensors import Tensors
from stoker.errors import ModelError


@dataclass(frozen=True)
class EncoderArgs:
    """The sizes of one encoder. `positions`: rows of its table of positions."""

    layers: int
    dim: int
    hidden: int
    heads: int
    vocab: int
    positions: int
    norm_eps: float

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ModelError(f"config.json: hidden_size {self.dim} is no multiple of {self.heads} heads")

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        return self.positions


def encoder_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `EncoderArgs` from Hugging Face's config.json. Raises `ModelError` naming the field."""
    fields = Fields(config, "config.json")
    fields.only("hidden_act", "gelu")
    fields.only("quantization_config", None)
    for name in ("is_decoder", "add_cross_attention"):
        fields.only(name, False)
    return {
        "layers": fields.count("num_hidden_layers"),
        "dim": fields.count("hidden_size"),
        "hidden": fields.count("intermediate_size"),
        "heads": fields.count("num_attention_heads"),
        "vocab": fields.count("vocab_size"),
        "positions": fields.count("max_position_embeddings"),
        "norm_eps": fields.number("layer_norm_eps", 1e-12),
    }


class Names(NamedTuple):
    """What a checkpoint calls the parts of a block's attention."""

    query: str
    key: str
    value: str
    output: str
    norm: str


class Attention:
    def __init__(self, args: EncoderArgs, layer: str, names: Names, tensors: Tensors, prefix: str):
        self.heads, self.head_dim = args.heads, args.dim // args.heads

        def linear(part: str) -> Linear:
            return Linear.take(tensors, f"{layer}.{part}", prefix, args.dim, args.dim, bias=True)

        self.query, self.key, self.value = linear(names.query), linear(names.key), linear(names.value)
        self.output = linear(names.output)
        self.norm = LayerNorm.take(tensors, f"{prefix}{layer}.{names.norm}", args.dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask) -> mx.array:
        queries, keys, values = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        y = attention(queries, keys, values, scale=self.head_dim**-0.5, mask=mask)
        return self.norm(x + self.output(y.swapaxes(1, 2).reshape(x.shape)))

    def _split(self, x: mx.array) -> mx.array:
        """(B, T, dim) to (B, heads, T, head_dim)."""
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).swapaxes(1, 2)


class MLP:
    def __init__(self, args: EncoderArgs, layer: str, tensors: Tensors, prefix: str):
        self.inner = Linear.take(tensors, f"{layer}.intermediate.dense", prefix, args.dim, args.hidden, bias=True)
        self.outer = Linear.take(tensors, f"{layer}.output.dense", prefix, args.hidden, args.dim, bias=True)
        self.norm = LayerNorm.take(tensors, f"{prefix}{layer}.output.LayerNorm", args.dim, args.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(x + self.outer(gelu(self.inner(x))))


class Block:
    def __init__(self, args: EncoderArgs, index: int, names: Names, tensors: Tensors, prefix: str):
        layer = f"encoder.layer.{index}"
        self.attention = Attention(args, layer, names, tensors, prefix)
        self.mlp = MLP(args, layer, tensors, prefix)

    def __call__(self, x: mx.array, mask: Mask) -> mx.array:
        return self.mlp(self.attention(x, mask))


class Encoder:
    """A model of kind "embed": tokens to hidden states."""

    args: EncoderArgs

    def __call__(self, tokens: mx.array, mask: mx.array | None = None) -> mx.array:
        """Hidden states (B, T, dim) of `tokens` int32 (B, T); `mask` bool (B, T) is True at real tokens, None for all.

        Hidden states at padding are meaningless: pool with the same mask.
        """
        raise NotImplementedError

    def unused(self, tensor: str) -> bool:
        """Whether a checkpoint may hold `tensor` though no sentence vector needs it."""
        # The position ids are a buffer; the pooler and the heads serve pre-training.
        return tensor.endswith("position_ids") or any(part in tensor for part in ("pooler.", "cls.", "lm_head."))
