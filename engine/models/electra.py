"""ELECTRA (Clark et al., 2020) as an encoder: ms-marco-electra.

BERT, whose embeddings may be narrower than its hidden states. Names and shapes are those of Hugging Face's
`ElectraModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.models.bert import Bert, BertArgs
from engine.models.encoder import encoder_sizes
from engine.models.fields import Fields
from engine.models.layers import Linear
from engine.weights.tensors import Tensors


@dataclass(frozen=True)
class ElectraArgs(BertArgs):
    """`embedding`: numbers of a token's embedding."""

    embedding: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ElectraArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        fields = Fields(config, "config.json")
        types, embedding = fields.count("type_vocab_size", 2), fields.count("embedding_size", 128)
        return cls(**encoder_sizes(config, "electra"), types=types, embedding=embedding)

    @property
    def embedded(self) -> int:
        return self.embedding


class Electra(Bert):
    """The encoder: tokens to hidden states."""

    def __init__(self, args: ElectraArgs, tensors: Tensors):
        super().__init__(args, tensors)
        if args.embedding != args.dim:
            self.widened = Linear.take(tensors, "embeddings_project", "", args.embedding, args.dim, bias=True)

    def unused(self, tensor: str) -> bool:
        # The heads of pre-training.
        return super().unused(tensor) or tensor.startswith(("discriminator_predictions.", "generator_"))
