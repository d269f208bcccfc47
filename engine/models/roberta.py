"""RoBERTa (Liu et al., 2019) and XLM-R (Conneau et al., 2020) as sentence encoders: multilingual E5, BGE-M3.

BERT with positions that count from the one after padding's. Names and shapes are those of Hugging Face's
`XLMRobertaModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.models.bert import Bert, BertArgs
from engine.models.encoder import encoder_sizes, past_padding
from engine.models.fields import Fields
from engine.weights.tensors import Tensors
from stoker.errors import ModelError


@dataclass(frozen=True)
class RobertaArgs(BertArgs):
    """`pad`: the id of padding, whose row of the table of positions is padding's; the first token has the next."""

    pad: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RobertaArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        fields = Fields(config, "config.json")
        types, pad = fields.count("type_vocab_size", 2), fields.index("pad_token_id", 1)
        args = cls(**encoder_sizes(config, config["model_type"]), types=types, pad=pad)
        if args.context < 1:
            raise ModelError(
                f"config.json: max_position_embeddings is {args.positions}; the first {pad + 1} of them are for "
                f"padding, whose pad_token_id is {pad}"
            )
        return args

    @property
    def context(self) -> int:
        return self.positions - self.pad - 1


class Roberta(Bert):
    """The encoder: tokens to hidden states."""

    args: RobertaArgs

    def __init__(self, args: RobertaArgs, tensors: Tensors):
        super().__init__(args, tensors)
        self.pad = args.pad

    def positions_within(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        return past_padding(tokens, self.pad)
