"""Mistral (Jiang et al., "Mistral 7B", 2023): the Llama decoder with a sliding window over the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from engine.models.fields import Fields
from engine.models.llama import LlamaArgs, decoder_sizes


@dataclass(frozen=True)
class MistralArgs(LlamaArgs):
    """The sizes of one Mistral model. Its GGUF files name the architecture llama."""

    architecture: ClassVar[str] = "mistral"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From Hugging Face's config.json; `sliding_window` holds for every layer, null is none.

        Raises `ModelError` naming a field that is absent, wrong, or asks for what is not implemented.
        """
        fields = Fields(config, "config.json")
        fields.only("attention_bias", False)
        window = config.get("sliding_window")
        return cls(**decoder_sizes(config), window=None if window is None else fields.count("sliding_window"))
