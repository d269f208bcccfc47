"""A decoder of the Llama family as an encoder: Qwen3-Embedding (Zhang et al., 2025).

Each token sees itself and those before it, so what pads a text on its right changes nothing of it, and the last token
has seen all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from engine.models.encoder import Encoder, Group, join, split
from engine.models.llama import Llama, LlamaArgs
from engine.weights.tensors import Tensors


class CausalEncoder(Encoder):
    """Tokens to hidden states after the final norm. It has no token types, and needs no head."""

    args: LlamaArgs
    typed = False

    def __init__(self, args: LlamaArgs, tensors: Tensors):
        #: Folders of embedding models have no head, whether or not their config says that it is tied.
        self.without_head = not args.tied and "lm_head.weight" not in tensors
        self.args = replace(args, tied=args.tied or self.without_head)
        self._llama = Llama(self.args, tensors)

    def forward(self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]) -> mx.array:
        parts = zip(split(tokens, groups), groups, strict=True)
        return join([self._llama(part).reshape(group.tokens, -1) for part, group in parts])

    def output_rows(self, ids: Sequence[int]) -> mx.array:
        """What a hidden state is multiplied with for the logits of these tokens, (ids, dim). The head is let go of."""
        index, head = mx.array(list(ids)), self._llama.lm_head
        self._llama.lm_head = None
        return self._llama.embed_tokens(index) if head is None else head.weight[:, index].T

    def unused(self, tensor: str) -> bool:
        return self._llama.unused(tensor)
