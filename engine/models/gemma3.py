"""Gemma 3's text model as an encoder: EmbeddingGemma (Vera et al., 2025), in which each token sees those behind it too.

Four norms a layer, norms of queries and keys, a gated approximate GELU. Most layers see a window around each token,
with a base of rope of their own; some see the whole text. Names and shapes are those of Hugging Face's
`Gemma3TextModel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from engine.models.allowed import CONTEXT, TABLES, Table
from engine.models.attention import attention, attention_nearby
from engine.models.encoder import Encoder, Group, join, split, unseen
from engine.models.fastmath import approximate_gelu
from engine.models.fields import Fields
from engine.models.layers import Embedding, Linear, RMSNorm
from engine.models.rope import LinearScaling, Rope
from engine.weights.tensors import Tensors
from stoker.contract.shown import as_json
from stoker.errors import ModelError

_FULL, _SLIDING = "full_attention", "sliding_attention"
#: What older files call the bases of rope, and their values where the file says none.
_BASES = {_FULL: ("rope_theta", 1_000_000.0), _SLIDING: ("rope_local_base_freq", 10_000.0)}
#: Names of an older form: of how many layers the last one sees all.
_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")


@dataclass(frozen=True)
class Gemma3Args:
    """The sizes of one model. `windowed`: for each layer whether it sees `reach` tokens on either side alone."""

    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    scale: float
    reach: int
    windowed: tuple[bool, ...]
    ropes: Mapping[bool, tuple[float, float]]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Gemma3Args:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        TABLES["gemma3_text"].check(config, "config.json")
        fields = Fields(config, "config.json")
        if not fields.flag("use_bidirectional_attention"):
            raise ModelError(
                "config.json: use_bidirectional_attention is not true; of Gemma 3, only EmbeddingGemma's kind embeds, "
                "in which a token sees those behind it"
            )
        layers, heads, kv_heads = (
            fields.count("num_hidden_layers"),
            fields.count("num_attention_heads", 8),
            fields.count("num_key_value_heads", 4),
        )
        head_dim = fields.count("head_dim", 256)
        if heads % kv_heads or head_dim % 2:
            raise ModelError(
                f"config.json: num_attention_heads is {heads}, num_key_value_heads {kv_heads} and head_dim {head_dim}: "
                "the first must be a multiple of the second, and the last even"
            )
        return cls(
            layers=layers,
            dim=fields.count("hidden_size"),
            hidden=fields.count("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=fields.count("vocab_size"),
            context=fields.count("max_position_embeddings", CONTEXT["gemma3_text"]),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
            # transformers halves the window that a file states where a token sees both sides.
            reach=fields.count("sliding_window", 4096) // 2,
            windowed=_windowed(config, fields, layers),
            ropes={False: _rope(config, _FULL), True: _rope(config, _SLIDING)},
        )


def _windowed(config: Mapping[str, Any], fields: Fields, layers: int) -> tuple[bool, ...]:
    types = config.get("layer_types")
    if types is None:
        every = fields.count(next((name for name in _PATTERN if config.get(name) is not None), _PATTERN[0]), 6)
        return tuple(index % every != 0 for index in range(1, min(layers, 1 << 16) + 1))
    if not isinstance(types, list) or len(types) != layers or not all(kind in (_FULL, _SLIDING) for kind in types):
        raise ModelError(
            f"config.json: layer_types {as_json(types)} is not a list of {layers} times {_FULL} or {_SLIDING}"
        )
    return tuple(kind == _SLIDING for kind in types)


def _rope(config: Mapping[str, Any], kind: str) -> tuple[float, float]:
    """The base of rope in layers of this kind, and by what positions are divided."""
    outer = Fields(config, "config.json")
    stated, older = outer.mapping("rope_parameters"), outer.mapping("rope_scaling")
    if not set(stated) <= {_FULL, _SLIDING}:
        raise ModelError(
            f"config.json: rope_parameters {as_json(stated)} is not supported; an object for {_FULL} and one for "
            f"{_SLIDING} are"
        )
    value = Fields(stated, "config.json: rope_parameters").mapping(kind)
    if kind == _FULL:
        value = {**value, **older}
    where = f"config.json: rope_parameters: {kind}"
    linear = value.get("rope_type", value.get("type", "default")) == "linear"
    types = ("default", "linear")
    used = ("rope_theta", "factor") if linear else ("rope_theta",)
    Table(used, {"rope_type": types, "type": types}).check(value, where)
    fields = Fields(value, where)
    name, default = _BASES[kind]
    base = outer.number(name, default) if value.get("rope_theta") is None else fields.number("rope_theta")
    return base, fields.number("factor") if linear else 1.0


def _norm(tensors: Tensors, name: str, dim: int, eps: float) -> RMSNorm:
    """Files hold how much a weight differs from 1."""
    return RMSNorm(1.0 + tensors.take(f"{name}.weight", (dim,)), eps)


class Attention:
    """Self-attention of every token to those of its own text, or to those nearby."""

    def __init__(self, args: Gemma3Args, index: int, rotate: Rope, tensors: Tensors):
        self.args, self.rotate, self.windowed = args, rotate, args.windowed[index]
        layer, size = f"model.layers.{index}.self_attn", args.head_dim

        def linear(part: str, inputs: int, outputs: int) -> Linear:
            return Linear.take(tensors, f"{layer}.{part}", "", inputs, outputs)

        self.q, self.output = (
            linear("q_proj", args.dim, args.heads * size),
            linear("o_proj", args.heads * size, args.dim),
        )
        self.k, self.v = (linear(part, args.dim, args.kv_heads * size) for part in ("k_proj", "v_proj"))
        self.q_norm, self.k_norm = (_norm(tensors, f"{layer}.{part}_norm", size, args.norm_eps) for part in "qk")

    def __call__(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        parts, size = [], self.args.head_dim
        every = (split(layer(x), groups) for layer in (self.q, self.k, self.v))
        for q, k, v, addend in zip(*every, addends, strict=True):
            rows, length, _ = q.shape
            queries, keys, values = (part.reshape(rows, length, -1, size).swapaxes(1, 2) for part in (q, k, v))
            queries, keys = self.rotate(self.q_norm(queries), 0), self.rotate(self.k_norm(keys), 0)
            if self.windowed:
                y = attention_nearby(queries, keys, values, scale=self.args.scale, reach=self.args.reach, addend=addend)
            else:
                y = attention(queries, keys, values, scale=self.args.scale, mask=addend)
            parts.append(y.swapaxes(1, 2).reshape(rows * length, -1))
        return self.output(join(parts))


class Block:
    def __init__(self, args: Gemma3Args, index: int, rotate: Rope, tensors: Tensors):
        layer = f"model.layers.{index}"
        self.attention = Attention(args, index, rotate, tensors)
        self.before, self.behind, self.mlp_before, self.mlp_behind = (
            _norm(tensors, f"{layer}.{name}_layernorm", args.dim, args.norm_eps)
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        )
        self.gate, self.up = (
            Linear.take(tensors, f"{layer}.mlp.{part}_proj", "", args.dim, args.hidden) for part in ("gate", "up")
        )
        self.down = Linear.take(tensors, f"{layer}.mlp.down_proj", "", args.hidden, args.dim)

    def __call__(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        x = x + self.behind(self.attention(self.before(x), groups, addends))
        inner = self.mlp_before(x)
        return x + self.mlp_behind(self.down(approximate_gelu(self.gate(inner)) * self.up(inner)))


class Gemma3Encoder(Encoder):
    """Tokens to hidden states after the final norm."""

    args: Gemma3Args
    #: It knows none.
    typed = False

    def __init__(self, args: Gemma3Args, tensors: Tensors):
        self.args = args
        self.words = Embedding.take(tensors, "model.embed_tokens", args.vocab, args.dim)
        ropes = {
            windowed: Rope(args.head_dim, base, LinearScaling(factor) if factor != 1.0 else None)
            for windowed, (base, factor) in args.ropes.items()
        }
        self.layers = [Block(args, index, ropes[args.windowed[index]], tensors) for index in range(args.layers)]
        self.norm = _norm(tensors, "model.norm", args.dim, args.norm_eps)

    def forward(self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]) -> mx.array:
        x = self.words(tokens)
        x = x * mx.array(math.sqrt(self.args.dim), x.dtype)
        masks = [group.mask for group in groups]
        addends = [None if mask is None else unseen(mask[:, None, None, :], x.dtype) for mask in masks]
        for layer in self.layers:
            x = layer(x, groups, addends)
        return self.norm(x)

    def unused(self, tensor: str) -> bool:
        # The head is the embedding; older checkpoints hold the rotary frequencies.
        return tensor == "lm_head.weight" or tensor.endswith("rotary_emb.inv_freq")
