"""Qwen2, Qwen2.5 and their Coder models (Qwen Team, 2024): the Llama decoder with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from engine.models.fields import Fields
from engine.models.llama import LlamaArgs
from engine.models.sizes import decoder_sizes, gguf_sizes
from stoker.contract.shown import as_json
from stoker.errors import ModelError


@dataclass(frozen=True)
class Qwen2Args(LlamaArgs):
    """The sizes of one Qwen2 model."""

    architecture: ClassVar[str] = "qwen2"
    gguf_permuted: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that asks for what is not implemented.

        That is a sliding window in some layers only, and the dual chunk attention of the models for a million tokens.
        """
        return cls(**decoder_sizes(config, cls.architecture), window=window(config), qkv_bias=True)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, vocab: int, tied: bool) -> Self:
        return cls(**gguf_sizes(metadata, cls.architecture), vocab=vocab, tied=tied, qkv_bias=True)


def window(config: Mapping[str, Any]) -> int | None:
    """The sliding window of all layers, or None. Raises `ModelError` for one that only some layers have.

    The files state `sliding_window` even where `use_sliding_window` is false and it means nothing. Layers from
    `max_window_layers` on slide.
    """
    fields = Fields(config, "config.json")
    layers = fields.count("num_hidden_layers")
    stated = config.get("sliding_window", 4096)
    if not fields.flag("use_sliding_window") or stated is None:
        stated, sliding = None, 0
    else:
        whole = config.get("max_window_layers", 28)
        if not isinstance(whole, int):
            raise ModelError(f"config.json: max_window_layers is {as_json(whole)}, not an integer")
        sliding = min(layers, max(0, layers - whole))
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise ModelError(f"config.json: layer_types {as_json(types)} is not a list of {layers} types")
        sliding = types.count("sliding_attention")
        if sliding + types.count("full_attention") != layers:
            raise ModelError(
                f"config.json: layer_types {as_json(types)} are not supported; full_attention and sliding_attention are"
            )
    if sliding not in (0, layers):
        raise ModelError(
            f"config.json: use_sliding_window with {sliding} sliding layers of {layers} is not supported; "
            "all layers or none may slide"
        )
    return Fields({"sliding_window": stated}, "config.json").count("sliding_window") if sliding else None
