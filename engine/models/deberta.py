"""DeBERTa v2 and v3 (He et al., 2021) as encoders: mxbai-rerank and many other cross-encoders.

BERT's block, in which a score has two more terms: that of the query with how far the key lies from it, and that of the
key with the same. Distances have embeddings of their own. Names and shapes are those of Hugging Face's
`DebertaV2Model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.models.attention import attention
from engine.models.bert import NAMES, Bert, BertArgs
from engine.models.encoder import Attention, Block, encoder_sizes
from engine.models.fields import Fields
from engine.models.layers import LayerNorm, Linear
from engine.weights.tensors import Tensors
from stoker.contract.shown import as_json
from stoker.errors import ModelError

_NAMES = NAMES._replace(
    query="attention.self.query_proj", key="attention.self.key_proj", value="attention.self.value_proj"
)
#: The terms that a score may have beyond that of query and key: of the query with its distance to the key, and of the
#: key with the same.
_TERMS = ("c2p", "p2c")


@dataclass(frozen=True)
class DebertaArgs(BertArgs):
    """`placed`: whether positions have embeddings that are added to those of tokens. `terms`: of a score, beyond the
    usual one. `shared`: whether distances go through the layers of queries and keys, or through layers of their own.
    `normed`: whether the embeddings of distances are.

    A distance has one of 2 · `span` embeddings: near ones have one each, others, up to `farthest`, one together with
    those next to them; all have one each where `buckets` is false.
    """

    placed: bool
    terms: tuple[str, ...]
    shared: bool
    normed: bool
    span: int
    farthest: int
    buckets: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DebertaArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        fields, sizes = Fields(config, "config.json"), encoder_sizes(config, "deberta-v2", norm_eps=1e-7)
        fields.only("embedding_size", sizes["dim"])
        fields.only("attention_head_size", sizes["dim"] // sizes["heads"])
        if not fields.flag("relative_attention"):
            raise ModelError("config.json: relative_attention is not true; only models with it are supported")
        farthest = _count(config, fields, "max_relative_positions") or sizes["positions"]
        buckets = _count(config, fields, "position_buckets")
        if buckets and not 0 < buckets // 2 < farthest - 1:
            raise ModelError(
                f"config.json: position_buckets is {buckets}, which are too few, or too many for the {farthest} "
                "distances that share them"
            )
        return cls(
            **sizes,
            types=fields.index("type_vocab_size", 0),
            placed=fields.flag("position_biased_input", default=True),
            terms=_terms(config),
            shared=fields.flag("share_att_key"),
            normed=_normed(config),
            span=buckets or farthest,
            farthest=farthest,
            buckets=buckets > 0,
        )


def _count(config: Mapping[str, Any], fields: Fields, name: str) -> int:
    """0 where the file says none, or a number below 1, which says the same."""
    value = config.get(name)
    return 0 if value is None or (type(value) is int and value < 1) else fields.count(name)


def _terms(config: Mapping[str, Any]) -> tuple[str, ...]:
    stated = config.get("pos_att_type")
    named = [] if stated is None else stated
    if isinstance(named, str):
        named = [term.strip() for term in named.lower().split("|")]
    if not isinstance(named, list) or not named or not all(term in _TERMS for term in named):
        raise ModelError(f"config.json: pos_att_type = {as_json(stated)} is not supported; {' and '.join(_TERMS)} are")
    return tuple(term for term in _TERMS if term in named)


def _normed(config: Mapping[str, Any]) -> bool:
    stated = config.get("norm_rel_ebd")
    if stated is not None and stated not in ("none", "layer_norm"):
        raise ModelError(f"config.json: norm_rel_ebd = {as_json(stated)} is not supported; none and layer_norm are")
    return bool(stated == "layer_norm")


class Distances:
    """Which of the embeddings of distances each query has with each key."""

    def __init__(self, args: DebertaArgs):
        #: That of the distance query − key, at context − 1 + that distance.
        self._rows, self._context = _rows(args), args.context

    def within(self, length: int) -> tuple[slice, mx.array]:
        """Those that a text of so many tokens needs, and which of these it is for query and key, (length, length)."""
        near = self._rows[self._context - length : self._context + length - 1]
        positions, first = mx.arange(length), int(near[0])
        apart = positions[:, None] - positions[None, :]
        return slice(first, int(near[-1]) + 1), mx.array(near - first)[apart + length - 1]


class DisentangledAttention(Attention):
    """`table`: the embeddings of distances (2 · span, dim)."""

    def __init__(self, args: DebertaArgs, layer: str, table: mx.array, distances: Distances, tensors: Tensors):
        super().__init__(args, layer, _NAMES, tensors)
        self._distances = distances
        self._scale = (self.head_dim * (1 + len(args.terms))) ** -0.5

        def sides(term: str, name: str, index: int) -> mx.array | None:
            if term not in args.terms:
                return None
            if args.shared:
                made = mx.split(self.qkv(table), 3, axis=-1)[index]
            else:
                made = Linear.take(tensors, f"{layer}.attention.self.{name}", "", args.dim, args.dim, bias=True)(table)
            made = mx.contiguous(made.reshape(-1, self.heads, self.head_dim).transpose(1, 2, 0))
            mx.eval(made)
            return made

        #: Keys and queries of distances, (heads, size, 2 · span).
        self._keys, self._queries = sides("c2p", "pos_key_proj", 1), sides("p2c", "pos_query_proj", 0)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, addend: mx.array | None) -> mx.array:
        used, rows = self._distances.within(queries.shape[2])
        terms = [] if addend is None else [addend]
        if self._keys is not None:
            terms.append(self._scale * _looked_up(queries @ self._keys[..., used], rows))
        if self._queries is not None:
            terms.append(self._scale * _looked_up(keys @ self._queries[..., used], rows.T).swapaxes(-1, -2))
        return attention(queries, keys, values, scale=self._scale, mask=reduce(mx.add, terms))


def _looked_up(products: mx.array, rows: mx.array) -> mx.array:
    """Of the products (texts, heads, tokens, distances) those with `rows` (tokens, others)."""
    return mx.take_along_axis(products, mx.broadcast_to(rows, (*products.shape[:2], *rows.shape)), axis=-1)


class Deberta(Bert):
    """The encoder: tokens to hidden states."""

    args: DebertaArgs

    def table_of_positions(self, tensors: Tensors) -> mx.array:
        if self.args.placed:
            return super().table_of_positions(tensors)
        return mx.zeros((1, self.args.dim), self.words.dtype)

    def blocks(self, tensors: Tensors) -> list[Block]:
        args = self.args
        table = tensors.take("encoder.rel_embeddings.weight", (2 * args.span, args.dim))
        if args.normed:
            table = LayerNorm.take(tensors, "encoder.LayerNorm", args.dim, args.norm_eps)(table)
        distances = Distances(args)
        names = [f"encoder.layer.{index}" for index in range(args.layers)]
        return [
            Block(args, name, _NAMES, tensors, DisentangledAttention(args, name, table, distances, tensors))
            for name in names
        ]

    def positions_within(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        return super().positions_within(tokens) if self.args.placed else np.zeros_like(tokens)

    def unused(self, tensor: str) -> bool:
        # The heads of pre-training, and positions that a model without them may bring along.
        heads = ("lm_predictions.", "mask_predictions.")
        return super().unused(tensor) or tensor.startswith((*heads, "embeddings.position_embeddings."))


def _rows(args: DebertaArgs) -> NDArray[np.int32]:
    """The row of every distance query − key from 1 − context to context − 1.

    Where they share rows, those up to half of the span have one each; beyond, rows grow logarithmically up to
    `farthest`, by float32 as in the reference implementation.
    """
    distances = np.arange(1 - args.context, args.context)
    if args.buckets:
        middle = args.span // 2
        size = np.maximum(np.abs(distances), middle).astype(np.float32)
        ratio = np.log(size / np.float32(middle)) / np.log(np.float32((args.farthest - 1) / middle))
        far = np.ceil(ratio * (middle - 1)).astype(np.int64) + middle
        distances = np.where(np.abs(distances) <= middle, distances, far * np.sign(distances))
    return np.clip(distances + args.span, 0, 2 * args.span - 1).astype(np.int32)
