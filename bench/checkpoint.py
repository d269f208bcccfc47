"""Model folders for benchmarks: the demo's model as dense float32, and random weights of the shapes that people run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten
from tokenizers import decoders, models, pre_tokenizers

from engine.models.bridge import weights

#: Qwen2.5-0.5B (config.json of Qwen/Qwen2.5-0.5B).
QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
#: The same, small: to try a benchmark where there is no GPU.
SMALL = {**QWEN, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 2048}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def write_random(folder: Path, config: dict[str, Any], dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A checkpoint with random weights, as Hugging Face lays it out."""
    mx.random.seed(0)
    dim, hidden, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head = dim // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> mx.array:
        made: mx.array = (mx.random.normal((rows, columns)) * columns**-0.5).astype(dtype)
        return made

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], dim), "model.norm.weight": mx.ones(dim, dtype)}
    for index in range(layers):
        name = f"model.layers.{index}"
        shapes = {"q_proj": (dim, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, dim)}
        for part, (rows, columns) in shapes.items():
            tensors[f"{name}.self_attn.{part}.weight"] = matrix(rows, columns)
            if part != "o_proj":
                tensors[f"{name}.self_attn.{part}.bias"] = matrix(1, rows)[0]
        for part, (rows, columns) in {"gate": (hidden, dim), "up": (hidden, dim), "down": (dim, hidden)}.items():
            tensors[f"{name}.mlp.{part}_proj.weight"] = matrix(rows, columns)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{part}.weight"] = mx.ones(dim, dtype)
    return _write(folder, config, tensors, _byte_tokenizer())


def write_bridged(folder: Path, config: dict[str, Any], dtype: mx.Dtype) -> Path:
    """A checkpoint of a `model_type` of mlx-lm: random matrices, all else as its network begins."""
    network, _ = weights.network_of(config, config["model_type"])
    mx.random.seed(0)
    tensors = {
        name: (array if array.ndim < 2 else mx.random.normal(array.shape) * array.shape[-1] ** -0.5).astype(dtype)
        for name, array in tree_flatten(network.parameters())
    }
    mx.eval(tensors)
    return _write(folder, config, tensors, _byte_tokenizer())


def write_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct of the installed package, dequantized to float32."""
    from engine.checkpoints.loading import load
    from stoker.catalogue import CATALOGUE

    loaded = load("smollm2", CATALOGUE["smollm2-135m-instruct"])
    decoder, args = loaded.llama, loaded.llama.args
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": args.dim,
        "intermediate_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": args.context,
        "rope_theta": args.rope_base,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tied,
        "hidden_act": "silu",
    }
    tensors = {"model.embed_tokens.weight": decoder.embed_tokens.weight, "model.norm.weight": decoder.norm.weight}
    for index, layer in enumerate(decoder.layers):
        name = f"model.layers.{index}"
        tensors[f"{name}.input_layernorm.weight"] = layer.input_layernorm.weight
        tensors[f"{name}.post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight
        for linear in layer.linears:
            tensors[f"model.{linear.name}.weight"] = mx.contiguous(linear.dense().T)
    return _write(folder, config, tensors, loaded.tokenizer.inner)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, mx.array], tokenizer: tokenizers.Tokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _byte_tokenizer() -> tokenizers.Tokenizer:
    """A token a byte: enough for prompts that are given as ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner
