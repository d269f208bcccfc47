"""ModernBERT (Warner et al., 2024) as a sentence encoder: gte-modernbert, modernbert-embed, granite-embedding-r2.

A pre-norm Transformer with rotary positions and a gated GELU. Most layers see a window around each token, with a base
of their own; some see the whole text. Names and shapes are those of Hugging Face's `ModernBertModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from engine.models.allowed import CONTEXT, TABLES, Table
from engine.models.attention import attention, attention_nearby
from engine.models.encoder import Group, LayerNormed, join, split, unseen
from engine.models.fastmath import gelu
from engine.models.fields import Fields
from engine.models.layers import Embedding, LayerNorm, Linear
from engine.models.rope import Rope, head_sizes
from engine.weights.tensors import Tensors
from stoker.contract.shown import as_json
from stoker.errors import ModelError

_FULL, _SLIDING = "full_attention", "sliding_attention"
#: The bases of rope where the file does not say, and what older files call them.
_BASES = {_FULL: ("global_rope_theta", 160_000.0), _SLIDING: ("local_rope_theta", 10_000.0)}


class Biases(NamedTuple):
    """Which parts have a bias."""

    norm: bool
    attention: bool
    mlp: bool


@dataclass(frozen=True)
class ModernBertArgs:
    """The sizes of one ModernBERT model. `windowed`: for each layer whether it sees `reach` tokens on either side
    alone. `bases`: of rope, for the layers that see all and for the others."""

    layers: int
    dim: int
    hidden: int
    heads: int
    vocab: int
    context: int
    norm_eps: float
    biases: Biases
    reach: int
    windowed: tuple[bool, ...]
    bases: tuple[float, float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModernBertArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        TABLES["modernbert"].check(config, "config.json")
        fields = Fields(config, "config.json")
        layers, (dim, heads) = fields.count("num_hidden_layers"), head_sizes(fields)
        return cls(
            layers=layers,
            dim=dim,
            hidden=fields.count("intermediate_size"),
            heads=heads,
            vocab=fields.count("vocab_size"),
            context=fields.count("max_position_embeddings", CONTEXT["modernbert"]),
            norm_eps=fields.number("norm_eps", 1e-5),
            biases=Biases(*(fields.flag(f"{part}_bias") for part in Biases._fields)),
            reach=fields.count("local_attention", 128) // 2,
            windowed=_windowed(config, fields, layers),
            bases=(_base(config, _FULL), _base(config, _SLIDING)),
        )


def _windowed(config: Mapping[str, Any], fields: Fields, layers: int) -> tuple[bool, ...]:
    """Older files say that every so many layers one sees all."""
    types = config.get("layer_types")
    if types is None:
        every = fields.count("global_attn_every_n_layers", 3)
        return tuple(index % every != 0 for index in range(min(layers, 1 << 16)))
    if not isinstance(types, list) or len(types) != layers or not all(kind in (_FULL, _SLIDING) for kind in types):
        raise ModelError(
            f"config.json: layer_types {as_json(types)} is not a list of {layers} times {_FULL} or {_SLIDING}"
        )
    return tuple(kind == _SLIDING for kind in types)


def _base(config: Mapping[str, Any], kind: str) -> float:
    """The base of rope in layers of this kind."""
    stated = Fields(config, "config.json").mapping("rope_parameters")
    if not set(stated) <= {_FULL, _SLIDING}:
        raise ModelError(
            f"config.json: rope_parameters {as_json(stated)} is not supported; an object for {_FULL} and one for "
            f"{_SLIDING} are"
        )
    value = Fields(stated, "config.json: rope_parameters").mapping(kind)
    where = f"config.json: rope_parameters: {kind}"
    Table(("rope_theta",), {"rope_type": ("default",), "type": ("default",)}).check(value, where)
    if value.get("rope_theta") is not None:
        return Fields(value, where).number("rope_theta")
    return Fields(config, "config.json").number(*_BASES[kind])


def norm_of(tensors: Tensors, name: str, args: ModernBertArgs) -> LayerNorm:
    weight = tensors.take(f"{name}.weight", (args.dim,))
    bias = tensors.take(f"{name}.bias", (args.dim,)) if args.biases.norm else mx.zeros_like(weight)
    return LayerNorm(weight, bias, args.norm_eps)


class Attention:
    """Self-attention of every token to those of its own text, or to those nearby."""

    def __init__(self, args: ModernBertArgs, index: int, rotate: Rope, tensors: Tensors):
        self.heads, self.rotate = args.heads, rotate
        self.reach = args.reach if args.windowed[index] else None
        layer, bias = f"layers.{index}.attn", args.biases.attention
        self.qkv = Linear.take(tensors, f"{layer}.Wqkv", "", args.dim, 3 * args.dim, bias=bias)
        self.output = Linear.take(tensors, f"{layer}.Wo", "", args.dim, args.dim, bias=bias)

    def __call__(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        parts = []
        for part, addend in zip(split(self.qkv(x), groups), addends, strict=True):
            rows, length, width = part.shape
            size = width // 3 // self.heads
            queries, keys, values = part.reshape(rows, length, 3, self.heads, size).transpose(2, 0, 3, 1, 4)
            queries, keys, scale = self.rotate(queries, 0), self.rotate(keys, 0), size**-0.5
            if self.reach is None:
                y = attention(queries, keys, values, scale=scale, mask=addend)
            else:
                y = attention_nearby(queries, keys, values, scale=scale, reach=self.reach, addend=addend)
            parts.append(y.swapaxes(1, 2).reshape(rows * length, -1))
        return self.output(join(parts))


class Block:
    def __init__(self, args: ModernBertArgs, index: int, rotate: Rope, tensors: Tensors):
        layer, bias = f"layers.{index}", args.biases.mlp
        #: The first layer gets what the norm of the embeddings gives.
        self.norm = norm_of(tensors, f"{layer}.attn_norm", args) if index else None
        self.attention = Attention(args, index, rotate, tensors)
        self.mlp_norm = norm_of(tensors, f"{layer}.mlp_norm", args)
        self.inner = Linear.take(tensors, f"{layer}.mlp.Wi", "", args.dim, 2 * args.hidden, bias=bias)
        self.outer = Linear.take(tensors, f"{layer}.mlp.Wo", "", args.hidden, args.dim, bias=bias)

    def __call__(
        self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]
    ) -> tuple[mx.array, mx.array]:
        """What comes out, as two parts of a sum."""
        x = x + self.attention(x if self.norm is None else self.norm(x), groups, addends)
        inner, gate = mx.split(self.inner(self.mlp_norm(x)), 2, axis=-1)
        return x, self.outer(gelu(inner) * gate)


class ModernBert(LayerNormed):
    """The encoder: tokens to hidden states."""

    args: ModernBertArgs
    #: It knows none.
    typed = False

    def __init__(self, args: ModernBertArgs, tensors: Tensors):
        self.args = args
        self.words = Embedding.take(tensors, "embeddings.tok_embeddings", args.vocab, args.dim)
        self.norm = norm_of(tensors, "embeddings.norm", args)
        ropes = [Rope(args.dim // args.heads, base) for base in args.bases]
        self.layers = [Block(args, index, ropes[args.windowed[index]], tensors) for index in range(args.layers)]
        self.final_norm = norm_of(tensors, "final_norm", args)

    def to_last_norm(
        self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]
    ) -> tuple[mx.array, mx.array, LayerNorm]:
        x = self.norm(self.words(tokens))
        masks = [group.mask for group in groups]
        addends = [None if mask is None else unseen(mask[:, None, None, :], x.dtype) for mask in masks]
        update = mx.zeros_like(x)
        for index, layer in enumerate(self.layers):
            x, update = layer(x + update if index else x, groups, addends)
        return x, update, self.final_norm

    def unused(self, tensor: str) -> bool:
        # Heads of pre-training and of classifiers.
        return tensor.startswith(("head.", "decoder.", "classifier."))
