"""The sizes of a model of the Llama family, from config.json and from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models import allowed, rope
from engine.models.fields import Fields
from stoker.contract.shown import as_json
from stoker.errors import ModelError


def decoder_sizes(config: Mapping[str, Any], architecture: str, *, head_dim: int | None = None) -> dict[str, Any]:
    """The fields that config.json has for the whole family, once nothing in it is beyond the architecture.

    `head_dim` is what an architecture takes where the file has none; else hidden_size / heads. Raises `ModelError`.
    """
    allowed.TABLES[architecture].check(config, "config.json")
    fields = Fields(config, "config.json")
    dim, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    context = fields.count("max_position_embeddings", allowed.CONTEXT[architecture])
    head_size = fields.count("head_dim", head_dim or dim // heads)
    base, scaling = rope.from_config(config, context, head_size)
    own_heads = "num_key_value_heads" not in config and allowed.KEY_VALUE_HEADS.get(architecture)
    kv_heads = fields.count("num_key_value_heads", own_heads or heads)
    if heads % kv_heads or head_size % 2:
        raise ModelError(
            f"config.json: num_attention_heads is {heads}, num_key_value_heads {kv_heads}, and a head has {head_size} "
            "numbers (head_dim, or hidden_size over the heads): the first must be a multiple of the second, and the "
            "last even"
        )
    return {
        "layers": fields.count("num_hidden_layers"),
        "dim": dim,
        "hidden": fields.count("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_size,
        "vocab": fields.count("vocab_size"),
        "context": context,
        "rope_base": base,
        "rope_scaling": scaling,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings"),
    }


def layers_of(config: Mapping[str, Any], kind: str, layers: int) -> None:
    """Refuse `layer_types` that are not all of this kind."""
    if config.get("layer_types") not in (None, [kind] * min(layers, 1 << 16)):
        raise ModelError(
            f"config.json: layer_types {as_json(config['layer_types'])} are not supported; only {layers} times "
            f"{kind} are"
        )


def gguf_sizes(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The same fields from GGUF metadata, whose keys start with `architecture`; without `vocab` and `tied`."""
    fields = Fields(metadata, "GGUF metadata")

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    own = {name: value for name, value in metadata.items() if name.startswith(f"{architecture}.")}
    allowed.gguf(architecture).check(own, "GGUF metadata")
    dim, heads = fields.count(key("embedding_length")), fields.count(key("attention.head_count"))
    head_dim = fields.count(key("attention.key_length"), dim // heads)
    fields.only(key("attention.value_length"), head_dim)
    fields.only(key("rope.dimension_count"), head_dim)
    base, scaling = rope.from_gguf(metadata, architecture)
    return {
        "layers": fields.count(key("block_count")),
        "dim": dim,
        "hidden": fields.count(key("feed_forward_length")),
        "heads": heads,
        "kv_heads": fields.count(key("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "context": fields.count(key("context_length")),
        "rope_base": base,
        "rope_scaling": scaling,
        "norm_eps": fields.number(key("attention.layer_norm_rms_epsilon")),
        "window": fields.index(key("attention.sliding_window"), 0) or None,
    }
