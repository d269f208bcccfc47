"""MPNet (Song et al., 2020) as a sentence encoder: all-mpnet-base-v2.

BERT's block with a relative position bias in T5's buckets (Raffel et al., 2020), one table for all layers; positions
count from 2, and there are no token types. Names and shapes are those of Hugging Face's `MPNetModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.models.encoder import Block, EncoderArgs, Names, PostNorm, RelativeBias, encoder_sizes, past_padding
from engine.models.layers import Embedding, LayerNorm
from engine.weights.tensors import Tensors
from stoker.errors import ModelError

_NAMES = Names(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    output="attention.attn.o",
    norm="attention.LayerNorm",
)
#: The id of <pad>. Its row of the table of positions is that of padding; the first token has the row after it.
_PAD = 1
#: The reference implementation computes with these and ignores the configuration.
_BUCKETS, _MAX_DISTANCE = 32, 128


@dataclass(frozen=True)
class MPNetArgs(EncoderArgs):
    """The sizes of one MPNet model."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MPNetArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        args = cls(**encoder_sizes(config, "mpnet"))
        if args.context < 1:
            raise ModelError(f"config.json: max_position_embeddings is {args.positions}; two of them are for padding")
        return args

    @property
    def context(self) -> int:
        return self.positions - _PAD - 1


class MPNet(PostNorm):
    """The encoder: tokens to hidden states."""

    def __init__(self, args: MPNetArgs, tensors: Tensors):
        self.args = args
        table = "embeddings"
        self.words = Embedding.take(tensors, f"{table}.word_embeddings", args.vocab, args.dim)
        self.positions = tensors.take(f"{table}.position_embeddings.weight", (args.positions, args.dim))
        self.norm = LayerNorm.take(tensors, f"{table}.LayerNorm", args.dim, args.norm_eps)
        bias = tensors.take("encoder.relative_attention_bias.weight", (_BUCKETS, args.heads))
        self.bias = RelativeBias(bias, _MAX_DISTANCE, args.context)
        self.layers = [Block(args, f"encoder.layer.{index}", _NAMES, tensors) for index in range(args.layers)]

    def position_ids(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        return past_padding(tokens, _PAD)

    def position_bias(self, length: int) -> mx.array:
        return self.bias(length)
