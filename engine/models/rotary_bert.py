"""BERT with rotary positions and a gated inner layer: Nomic-BERT (Nussbaum et al., 2024) and GTE (Zhang et al., 2024).

Post-norm blocks; the two differ in the names of their tensors, in their biases and in the function of the gate. Nomic's
folders name code of their own (`auto_map`), which is never run: what is computed is transformers' own form of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from engine.models.allowed import CONTEXT, RENAMED, TABLES, Table
from engine.models.attention import attention
from engine.models.encoder import Group, LayerNormed, join, split, unseen
from engine.models.fastmath import gelu, swiglu
from engine.models.fields import Fields, renamed, spelled
from engine.models.layers import Embedding, LayerNorm, Linear
from engine.models.rope import Rope, head_sizes
from engine.weights.tensors import Tensors


class _Parts(NamedTuple):
    """What a checkpoint calls the parts of a layer, of which `layer` is the path. `inner`: what is gated and its gate,
    in one tensor or in two. `biased`: whether all except `inner` have a bias."""

    layer: str
    embeddings_norm: str
    qkv: str
    output: str
    norm: str
    inner: tuple[str, ...]
    outer: str
    mlp_norm: str
    biased: bool


_NOMIC = _Parts(
    "encoder.layers", "emb_ln", "attn.Wqkv", "attn.out_proj", "norm1", ("mlp.fc11", "mlp.fc12"), "mlp.fc2", "norm2",
    biased=False,
)  # fmt: skip
_GTE = _Parts(
    "encoder.layer", "embeddings.LayerNorm", "attention.qkv_proj", "attention.o_proj", "attn_ln",
    ("mlp.up_gate_proj",), "mlp.down_proj", "mlp_ln", biased=True,
)  # fmt: skip
#: `model_type` -> the base of rope where the file does not say.
_BASES = {"nomic_bert": 1000.0, "gte": 160_000.0}


@dataclass(frozen=True)
class RotaryBertArgs:
    """The sizes of one model. `types`: token types, of which there may be none. `base`: of rope."""

    architecture: str
    layers: int
    dim: int
    hidden: int
    heads: int
    vocab: int
    context: int
    norm_eps: float
    types: int
    base: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RotaryBertArgs:
        """From Hugging Face's config.json, or Nomic's own. Raises `ModelError` naming a field that is absent or not
        supported."""
        architecture = str(config["model_type"])
        TABLES[architecture].check(config, "config.json")
        names = RENAMED.get(architecture, {})
        given = renamed(config, names)
        fields = Fields(given, "config.json", spelled(config, names))
        dim, heads = head_sizes(fields)
        fields.only("head_dim", dim // heads)
        return cls(
            architecture=architecture,
            layers=fields.count("num_hidden_layers"),
            dim=dim,
            hidden=fields.count("intermediate_size"),
            heads=heads,
            vocab=fields.count("vocab_size"),
            context=fields.count("max_position_embeddings", CONTEXT[architecture]),
            norm_eps=fields.number("layer_norm_eps", 1e-12),
            types=fields.index("type_vocab_size", 1 if architecture == "gte" else 2),
            base=_base(given, architecture),
        )


def _base(config: Mapping[str, Any], architecture: str) -> float:
    stated, where = Fields(config, "config.json").mapping("rope_parameters"), "config.json: rope_parameters"
    Table(("rope_theta",), {"rope_type": ("default",), "type": ("default",)}).check(stated, where)
    if stated.get("rope_theta") is not None:
        return Fields(stated, where).number("rope_theta")
    return Fields(config, "config.json").number("rope_theta", _BASES[architecture])


class Block:
    def __init__(self, args: RotaryBertArgs, parts: _Parts, index: int, rotate: Rope, tensors: Tensors):
        self.heads, self.rotate, self.silu = args.heads, rotate, args.architecture == "nomic_bert"
        layer = f"{parts.layer}.{index}"

        def linear(part: str, inputs: int, outputs: int, *, bias: bool = parts.biased) -> Linear:
            return Linear.take(tensors, f"{layer}.{part}", "", inputs, outputs, bias=bias)

        self.qkv, self.output = linear(parts.qkv, args.dim, 3 * args.dim), linear(parts.output, args.dim, args.dim)
        each = 2 * args.hidden // len(parts.inner)
        self.inner = [linear(part, args.dim, each, bias=False) for part in parts.inner]
        self.outer = linear(parts.outer, args.hidden, args.dim)
        self.norm, self.mlp_norm = (
            LayerNorm.take(tensors, f"{layer}.{part}", args.dim, args.norm_eps) for part in (parts.norm, parts.mlp_norm)
        )

    def attention(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        parts = []
        for part, addend in zip(split(self.qkv(x), groups), addends, strict=True):
            rows, length, width = part.shape
            size = width // 3 // self.heads
            queries, keys, values = part.reshape(rows, length, 3, self.heads, size).transpose(2, 0, 3, 1, 4)
            queries, keys = self.rotate(queries, 0), self.rotate(keys, 0)
            y = attention(queries, keys, values, scale=size**-0.5, mask=addend)
            parts.append(y.swapaxes(1, 2).reshape(rows * length, -1))
        return self.norm.of_sum(x, self.output(join(parts)))

    def update(self, x: mx.array) -> mx.array:
        """What is added to x before the last norm."""
        made = [layer(x) for layer in self.inner]
        up, gate = mx.split(made[0], 2, axis=-1) if len(made) == 1 else made
        return self.outer(swiglu(gate, up) if self.silu else gelu(gate) * up)


class RotaryBert(LayerNormed):
    """The encoder: tokens to hidden states."""

    args: RotaryBertArgs

    def __init__(self, args: RotaryBertArgs, tensors: Tensors):
        self.args, parts = args, _NOMIC if args.architecture == "nomic_bert" else _GTE
        self.words = Embedding.take(tensors, "embeddings.word_embeddings", args.vocab, args.dim)
        #: What is added to every token: the embedding of token type 0, where there is one.
        self.type: mx.array | None = None
        if args.types:
            types = tensors.take("embeddings.token_type_embeddings.weight", (args.types, args.dim))
            self.type = mx.contiguous(types[0])
            mx.eval(self.type)
        self.norm = LayerNorm.take(tensors, parts.embeddings_norm, args.dim, args.norm_eps)
        rotate = Rope(args.dim // args.heads, args.base)
        self.layers = [Block(args, parts, index, rotate, tensors) for index in range(args.layers)]

    def to_last_norm(
        self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]
    ) -> tuple[mx.array, mx.array, LayerNorm]:
        words = self.words(tokens)
        x = self.norm(words if self.type is None else words + self.type)
        masks = [group.mask for group in groups]
        addends = [None if mask is None else unseen(mask[:, None, None, :], x.dtype) for mask in masks]
        for layer in self.layers[:-1]:
            x = layer.attention(x, groups, addends)
            x = layer.mlp_norm.of_sum(x, layer.update(x))
        last = self.layers[-1]
        x = last.attention(x, groups, addends)
        return x, last.update(x), last.mlp_norm

    def unused(self, tensor: str) -> bool:
        # Buffers, and the heads of pre-training.
        return tensor.endswith(("position_ids", "inv_freq")) or tensor.startswith(("pooler.", "cls.", "lm_head."))
