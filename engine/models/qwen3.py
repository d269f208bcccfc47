"""Qwen3, dense (Qwen Team, 2025): the Llama decoder with an RMSNorm over each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from engine.models.llama import LlamaArgs
from engine.models.qwen2 import window
from engine.models.sizes import decoder_sizes, gguf_sizes


@dataclass(frozen=True)
class Qwen3Args(LlamaArgs):
    """The sizes of one dense Qwen3 model. The size of a head is its own: heads · head_dim need not be dim."""

    architecture: ClassVar[str] = "qwen3"
    gguf_permuted: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that asks for what is not implemented."""
        return cls(**decoder_sizes(config, cls.architecture, head_dim=128), window=window(config), qk_norm=True)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, vocab: int, tied: bool) -> Self:
        return cls(**gguf_sizes(metadata, cls.architecture), vocab=vocab, tied=tied, qk_norm=True)
