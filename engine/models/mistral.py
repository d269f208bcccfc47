"""Mistral (Jiang et al., "Mistral 7B", 2023): the Llama decoder with a sliding window over the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from engine.models.allowed import MISTRAL_WINDOW
from engine.models.fields import Fields
from engine.models.llama import LlamaArgs
from engine.models.sizes import decoder_sizes, layers_of


@dataclass(frozen=True)
class MistralArgs(LlamaArgs):
    """The sizes of one Mistral model. Its GGUF files name the architecture llama."""

    architecture: ClassVar[str] = "mistral"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From Hugging Face's config.json; `sliding_window` holds for every layer, null is none, absent is 4096.

        Raises `ModelError` naming a field that is absent, wrong, or asks for what is not implemented.
        """
        sizes = decoder_sizes(config, cls.architecture)
        stated = config.get("sliding_window", MISTRAL_WINDOW)
        window = None if stated is None else Fields({"sliding_window": stated}, "config.json").count("sliding_window")
        layers_of(config, "sliding_attention" if window else "full_attention", sizes["layers"])
        return cls(**sizes, window=window)
