"""ALBERT (Lan et al., 2020) as a sentence encoder: paraphrase-albert.

BERT with narrow embeddings, whose layers share their weights. Names and shapes are those of Hugging Face's
`AlbertModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from engine.models.bert import Bert, BertArgs
from engine.models.encoder import Block, Names, encoder_sizes
from engine.models.fastmath import approximate_gelu, gelu
from engine.models.fields import Fields
from engine.models.layers import Linear
from engine.weights.tensors import Tensors
from stoker.errors import ModelError

_NAMES = Names(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    output="attention.dense",
    norm="attention.LayerNorm",
    inner="ffn",
    outer="ffn_output",
    last="full_layer_layer_norm",
)
#: The same function under each of its names.
_APPROXIMATE = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class AlbertArgs(BertArgs):
    """`embedding`: numbers of a token's embedding. `groups`: so many layers in turn have weights of their own, each for
    an equal part of all `layers`; each layer is `inner` blocks. `approximate`: whether GELU is, by tanh."""

    embedding: int
    groups: int
    inner: int
    approximate: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AlbertArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        fields, sizes = Fields(config, "config.json"), encoder_sizes(config, "albert")
        args = cls(
            **sizes,
            types=fields.count("type_vocab_size", 2),
            embedding=fields.count("embedding_size", 128),
            groups=fields.count("num_hidden_groups", 1),
            inner=fields.count("inner_group_num", 1),
            approximate=config.get("hidden_act") in (None, *_APPROXIMATE),
        )
        if args.groups > args.layers:
            raise ModelError(f"config.json: num_hidden_groups is {args.groups}, and num_hidden_layers {args.layers}")
        return args

    @property
    def embedded(self) -> int:
        return self.embedding

    @property
    def activation(self) -> Callable[[mx.array], mx.array]:
        return approximate_gelu if self.approximate else gelu


class Albert(Bert):
    """The encoder: tokens to hidden states."""

    args: AlbertArgs

    def __init__(self, args: AlbertArgs, tensors: Tensors):
        super().__init__(args, tensors)
        name = "encoder.embedding_hidden_mapping_in"
        self.widened = Linear.take(tensors, name, "", args.embedding, args.dim, bias=True)

    def blocks(self, tensors: Tensors) -> list[Block]:
        args, name = self.args, "encoder.albert_layer_groups.{}.albert_layers.{}"
        groups = [
            [Block(args, name.format(group, index), _NAMES, tensors) for index in range(args.inner)]
            for group in range(args.groups)
        ]
        # By a quotient of floats, as the reference implementation has it.
        layers = [groups[int(layer / (args.layers / args.groups))] for layer in range(args.layers)]
        return [block for blocks in layers for block in blocks]

    def unused(self, tensor: str) -> bool:
        # The heads of pre-training.
        return super().unused(tensor) or tensor.startswith(("predictions.", "sop_classifier."))
