"""DistilBERT (Sanh et al., 2019) as a sentence encoder: msmarco-distilbert, multi-qa-distilbert.

BERT's block under other names, without token types. Names and shapes are those of Hugging Face's `DistilBertModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.models.encoder import Block, EncoderArgs, Names, PostNorm, encoder_sizes
from engine.models.layers import Embedding, LayerNorm
from engine.weights.tensors import Tensors

_NAMES = Names(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    norm="sa_layer_norm",
    inner="ffn.lin1",
    outer="ffn.lin2",
    last="output_layer_norm",
)


@dataclass(frozen=True)
class DistilBertArgs(EncoderArgs):
    """The sizes of one DistilBERT model."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DistilBertArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        # The reference implementation knows no other epsilon.
        return cls(**encoder_sizes(config, "distilbert"))


class DistilBert(PostNorm):
    """The encoder: tokens to hidden states."""

    #: It knows none.
    typed = False

    def __init__(self, args: DistilBertArgs, tensors: Tensors):
        self.args = args
        table = "embeddings"
        self.words = Embedding.take(tensors, f"{table}.word_embeddings", args.vocab, args.dim)
        self.positions = tensors.take(f"{table}.position_embeddings.weight", (args.positions, args.dim))
        self.norm = LayerNorm.take(tensors, f"{table}.LayerNorm", args.dim, args.norm_eps)
        self.layers = [Block(args, f"transformer.layer.{index}", _NAMES, tensors) for index in range(args.layers)]

    def unused(self, tensor: str) -> bool:
        # The heads of pre-training.
        return super().unused(tensor) or tensor.startswith("vocab_")
