"""BERT (Devlin et al., 2019) as a sentence encoder (Reimers and Gurevych, 2019).

Post-norm, learned positions, exact GELU; names and shapes are those of Hugging Face's `BertModel`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from engine.models.attention import Mask, attention
from engine.models.fastmath import gelu
from engine.models.fields import Fields
from engine.models.layers import Embedding, LayerNorm, Linear
from engine.weights.tensors import Tensors
from stoker.errors import ModelError


@dataclass(frozen=True)
class BertArgs:
    """The sizes of one BERT model."""

    layers: int
    dim: int
    hidden: int
    heads: int
    vocab: int
    positions: int
    types: int
    norm_eps: float

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ModelError(f"config.json: hidden_size {self.dim} is no multiple of {self.heads} heads")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BertArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        fields = Fields(config, "config.json")
        fields.only("hidden_act", "gelu")
        fields.only("position_embedding_type", "absolute")
        for name in ("is_decoder", "add_cross_attention"):
            fields.only(name, False)
        fields.only("quantization_config", None)
        return cls(
            layers=fields.count("num_hidden_layers"),
            dim=fields.count("hidden_size"),
            hidden=fields.count("intermediate_size"),
            heads=fields.count("num_attention_heads"),
            vocab=fields.count("vocab_size"),
            positions=fields.count("max_position_embeddings"),
            types=fields.count("type_vocab_size", 2),
            norm_eps=fields.number("layer_norm_eps", 1e-12),
        )


class Attention:
    def __init__(self, args: BertArgs, index: int, tensors: Tensors, prefix: str):
        self.heads, self.head_dim = args.heads, args.dim // args.heads
        name = f"encoder.layer.{index}.attention"

        def linear(part: str) -> Linear:
            return Linear.take(tensors, f"{name}.{part}", prefix, args.dim, args.dim, bias=True)

        self.query, self.key, self.value = linear("self.query"), linear("self.key"), linear("self.value")
        self.output = linear("output.dense")
        self.norm = LayerNorm.take(tensors, f"{prefix}{name}.output.LayerNorm", args.dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask) -> mx.array:
        queries, keys, values = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        y = attention(queries, keys, values, scale=self.head_dim**-0.5, mask=mask)
        return self.norm(x + self.output(y.swapaxes(1, 2).reshape(x.shape)))

    def _split(self, x: mx.array) -> mx.array:
        """(B, T, dim) to (B, heads, T, head_dim)."""
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).swapaxes(1, 2)


class MLP:
    def __init__(self, args: BertArgs, index: int, tensors: Tensors, prefix: str):
        name = f"encoder.layer.{index}"
        self.inner = Linear.take(tensors, f"{name}.intermediate.dense", prefix, args.dim, args.hidden, bias=True)
        self.outer = Linear.take(tensors, f"{name}.output.dense", prefix, args.hidden, args.dim, bias=True)
        self.norm = LayerNorm.take(tensors, f"{prefix}{name}.output.LayerNorm", args.dim, args.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(x + self.outer(gelu(self.inner(x))))


class Block:
    def __init__(self, args: BertArgs, index: int, tensors: Tensors, prefix: str):
        self.attention, self.mlp = Attention(args, index, tensors, prefix), MLP(args, index, tensors, prefix)

    def __call__(self, x: mx.array, mask: Mask) -> mx.array:
        return self.mlp(self.attention(x, mask))


class Bert:
    """The encoder: tokens to hidden states. Checkpoints with and without the `bert.` prefix are read."""

    def __init__(self, args: BertArgs, tensors: Tensors):
        self.args = args
        prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors else ""
        table = f"{prefix}embeddings"
        self.words = Embedding(tensors.take(f"{table}.word_embeddings.weight", (args.vocab, args.dim)))
        positions = tensors.take(f"{table}.position_embeddings.weight", (args.positions, args.dim))
        types = tensors.take(f"{table}.token_type_embeddings.weight", (args.types, args.dim))
        #: Position embeddings with that of token type 0 added: sentence encoders know no second segment.
        self.positions = positions + types[0]
        mx.eval(self.positions)
        self.norm = LayerNorm.take(tensors, f"{table}.LayerNorm", args.dim, args.norm_eps)
        self.layers = [Block(args, index, tensors, prefix) for index in range(args.layers)]

    def embed(self, tokens: mx.array, positions: mx.array) -> mx.array:
        """The first layer's input (…, dim) of `tokens` at `positions`, int32 of one shape (…)."""
        return self.norm(self.words(tokens) + self.positions[positions])

    def __call__(self, tokens: mx.array, mask: mx.array | None = None) -> mx.array:
        """Hidden states (B, T, dim) of `tokens` int32 (B, T); `mask` bool (B, T) is True at real tokens, None for all.

        Hidden states at padding are meaningless: pool with the same mask.
        """
        x = self.embed(tokens, mx.arange(tokens.shape[1])[None])
        seen = None if mask is None else mask.astype(mx.bool_)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, seen)
        return x


@dataclass(frozen=True)
class EmbeddingSpec:
    """How hidden states become one vector a text: `pooling` is "mean" or "cls"."""

    max_tokens: int
    pooling: str
    normalize: bool
    dim: int

    @classmethod
    def from_folder(cls, folder: Path, args: BertArgs) -> EmbeddingSpec:
        """From sentence-transformers' files; without them, its own default: the mean, not normalized.

        Raises `ModelError` for a module or a pooling that is not supported.
        """
        limit = _read(folder / "sentence_bert_config.json").get("max_seq_length")
        max_tokens = min(limit, args.positions) if isinstance(limit, int) and limit > 0 else args.positions
        pooling, normalize = "mean", False
        for module in _modules(folder):
            kind = str(module.get("type", "")).rsplit(".", 1)[-1]
            if kind == "Pooling":
                pooling = _pooling(folder / str(module.get("path", "1_Pooling")) / "config.json")
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise ModelError(f"{folder}: the module {kind or module!r} is not supported")
        return cls(max_tokens, pooling, normalize, args.dim)


def _read(path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content


def _json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error


def _modules(folder: Path) -> list[dict[str, Any]]:
    modules = _json(folder / "modules.json") or []
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{folder / 'modules.json'}: not a list of modules")
    return modules


def _pooling(path: Path) -> str:
    config = _read(path)
    modes = [name.removeprefix("pooling_mode_") for name, on in config.items() if on is True and "_mode_" in name]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise ModelError(f"{path}: pooling {modes} is not supported; one of mean and cls is")
    return names[modes[0]]
