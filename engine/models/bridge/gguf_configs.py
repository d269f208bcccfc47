"""What a GGUF file says of an architecture beyond the Llama family, in the words of a config.json. No MLX."""

from __future__ import annotations

from typing import Any

from engine.models.bridge.gguf_keys import Keys
from engine.models.bridge.gguf_models import GgufModel
from engine.weights.gguf import GGUF
from stoker.errors import ModelError


def config_of(gguf: GGUF, model: GgufModel) -> dict[str, Any]:
    """The config.json of a file. Raises `ModelError` naming a key."""
    keys = Keys(gguf.metadata, gguf.metadata["general.architecture"])
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{gguf.path}: the tensor 'token_embd.weight' is missing or no matrix")
    dim, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", dim // heads)
    keys.only("attention.value_length", head_dim)
    sizes: dict[str, Any] = {
        "model_type": model.file,
        "vocab_size": embedding.shape[0],
        "hidden_size": dim,
        "num_hidden_layers": keys.count("block_count"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.count("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    config = {**sizes, **model.details(keys, gguf, sizes)}
    if "partial_rotary_factor" not in config:
        keys.only("rope.dimension_count", head_dim)
    keys.finish()
    return config
