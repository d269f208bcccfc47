"""Random checkpoints of the sizes that benchmarks speak of, for both sides to load: no download, the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import tokenizers
from tokenizers import models, pre_tokenizers

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
    "llama-160m": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
    "tiny": {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
}


def write(folder: Path, shape: str, dtype: mx.Dtype) -> None:
    """A checkpoint in Hugging Face's form, with a tokenizer whose text is its ids: "t3 t14 t15"."""
    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    words = models.WordLevel({f"t{index}": index for index in range(config["vocab_size"])}, unk_token="t0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    mx.random.seed(0)
    arrays = {name: _random(name, sides, dtype) for name, sides in _tensors(config).items()}
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.self_attn.q_proj.weight": (dim, dim),
            f"{name}.self_attn.k_proj.weight": (kv, dim),
            f"{name}.self_attn.v_proj.weight": (kv, dim),
            f"{name}.self_attn.o_proj.weight": (dim, dim),
            f"{name}.mlp.gate_proj.weight": (hidden, dim),
            f"{name}.mlp.up_proj.weight": (hidden, dim),
            f"{name}.mlp.down_proj.weight": (dim, hidden),
            f"{name}.input_layernorm.weight": (dim,),
            f"{name}.post_attention_layernorm.weight": (dim,),
        }
        if config["model_type"] == "qwen2":
            found |= {
                f"{name}.self_attn.{part}_proj.bias": (width,) for part, width in (("q", dim), ("k", kv), ("v", kv))
            }
    found["model.norm.weight"] = (dim,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], dim)
    return found


def _random(name: str, sides: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if name.endswith("norm.weight"):
        return mx.ones(sides, dtype)
    return (mx.random.normal(sides) * 0.02).astype(dtype)
