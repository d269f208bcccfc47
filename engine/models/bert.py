"""BERT (Devlin et al., 2019) as a sentence encoder (Reimers and Gurevych, 2019): MiniLM, E5, BGE.

Learned positions and one token type; names and shapes are those of Hugging Face's `BertModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.models.encoder import Block, EncoderArgs, Names, PostNorm, encoder_sizes
from engine.models.fields import Fields
from engine.models.layers import Embedding, LayerNorm
from engine.weights.tensors import Tensors

#: What BERT's files call the parts of a block.
NAMES = Names(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    norm="attention.output.LayerNorm",
)


@dataclass(frozen=True)
class BertArgs(EncoderArgs):
    """The sizes of one BERT model. `types`: token types; 0 for a model that does without."""

    types: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BertArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        types = Fields(config, "config.json").count("type_vocab_size", 2)
        return cls(**encoder_sizes(config, "bert"), types=types)


class Bert(PostNorm):
    """The encoder: tokens to hidden states."""

    args: BertArgs

    def __init__(self, args: BertArgs, tensors: Tensors):
        self.args = args
        table = "embeddings"
        self.words = Embedding.take(tensors, f"{table}.word_embeddings", args.vocab, args.embedded)
        positions = self.table_of_positions(tensors)
        self._rows = positions.shape[0]
        #: Position embeddings with that of token type 0 added, and behind them those with that of type 1: rerankers
        #: have the query of type 0 and the text of type 1, where there are two.
        self.positions = positions
        if args.types:
            types = tensors.take(f"{table}.token_type_embeddings.weight", (args.types, args.embedded))
            self.positions = mx.concatenate([positions + types[index] for index in range(min(args.types, 2))])
            mx.eval(self.positions)
        self.norm = LayerNorm.take(tensors, f"{table}.LayerNorm", args.embedded, args.norm_eps)
        self.layers = self.blocks(tensors)

    def table_of_positions(self, tensors: Tensors) -> mx.array:
        """(positions, `args.embedded`)."""
        return tensors.take("embeddings.position_embeddings.weight", (self.args.positions, self.args.embedded))

    def blocks(self, tensors: Tensors) -> list[Block]:
        """In the order in which a text goes through them."""
        return [Block(self.args, f"encoder.layer.{index}", NAMES, tensors) for index in range(self.args.layers)]

    def token_ids(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        return tokens % self.args.vocab

    def position_ids(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        within = self.positions_within(self.token_ids(tokens))
        return (within + self._rows * (tokens // self.args.vocab)).astype(np.int32)

    def positions_within(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """The position of each token in its text."""
        return super().position_ids(tokens)
