"""Tiny GGUF files of architectures beyond the Llama family, as llama.cpp's converters lay them out (`conversion/`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from engine.checkpoints.loading import load
from engine.models.bridge.configs import text_config
from engine.weights.gguf import TensorInfo
from tests.engine import bridged
from tests.engine.architectures import SIZES, VOCAB, config

#: Network's part of a name -> GGUF's, for all.
_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GEMMA = {
    **_PARTS, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def _experts(where: str) -> dict[str, str]:
    return {f"{where}.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}


_QWEN_MOE = {
    **_PARTS, **_experts("mlp.switch_mlp"), "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}  # fmt: skip
#: Model file -> GGUF's name of the architecture, and its parts.
LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "gemma": ("gemma", _PARTS),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3", _GEMMA),
    "phi3": ("phi3", {**_PARTS, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}),
    "qwen2_moe": ("qwen2moe", _QWEN_MOE),
    "qwen3_moe": ("qwen3moe", _QWEN_MOE),
    "gpt_oss": ("gpt-oss", {
        **_PARTS, **_experts("mlp.experts"), "mlp.router": "ffn_gate_inp", "self_attn.sinks": "attn_sinks",
        "post_attention_layernorm": "post_attention_norm",
    }),
    "granite": ("granite", _PARTS),
    "smollm3": ("smollm3", _PARTS),
    "olmo2": ("olmo2", _GEMMA),
    "mixtral": ("llama", {**_PARTS, **_experts("block_sparse_moe.switch_mlp"),
                          "block_sparse_moe.gate": "ffn_gate_inp"}),
}  # fmt: skip
_PERMUTED = ("granite", "smollm3", "mixtral")
_ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}  # fmt: skip
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
#: What each says beyond the sizes: GGUF's key -> config.json's field.
_FIELDS: dict[str, dict[str, str]] = {
    "gemma": {},
    "gemma2": {"attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
               "final_logit_softcapping": "final_logit_softcapping"},
    "gemma3_text": {"attention.sliding_window": "sliding_window", "rope.freq_base": "rope_theta",
                    "attention.sliding_window_pattern": "sliding_window_pattern"},
    "phi3": {"rope.freq_base": "rope_theta",
             "rope.scaling.original_context_length": "original_max_position_embeddings"},
    "qwen2_moe": {**_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size",
                  "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    "qwen3_moe": {**_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"},
    "gpt_oss": {**_EXPERTS, "attention.sliding_window": "sliding_window",
                "expert_feed_forward_length": "intermediate_size"},
    "granite": {"rope.dimension_count": "head_dim", "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling"},
    "smollm3": {"rope.dimension_count": "head_dim", "rope.freq_base": "rope_theta"},
    "olmo2": {"rope.freq_base": "rope_theta"},
    "mixtral": {**_EXPERTS, "rope.dimension_count": "head_dim"},
}  # fmt: skip
_SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
}  # fmt: skip


def write(
    path: Path, name: str, kind: str = "F32", *, change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None
) -> nn.Module:
    """A file of mlx-lm's network `name`, which is returned, with matrices of the type `kind`. `change`: what becomes of
    its tensors before."""
    network, described = bridged.network(name)[0], {**SIZES, **text_config(config(name))}
    architecture, parts = LAYOUTS[name]
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, field in {**_SIZES, **_FIELDS[name]}.items():
        add(writer, f"{architecture}.{key}", described[field])
    if name == "phi3":
        add_longrope(writer, described)
    add_sentencepiece(writer)
    found = dict(tensors(network, name, parts))
    change(found)
    for tensor, values in found.items():
        add_tensor(writer, tensor, values, kind)
    finish(writer)
    if name == "smollm3":  # the tiny one has none in each second layer; files say nothing of it
        network.layers[1].self_attn.rope = network.layers[0].self_attn.rope
    if name == "gemma3_text":  # its converter writes no head
        network.pop("lm_head")
        network.tie_word_embeddings = True
    return network


def add_longrope(writer: gguf.GGUFWriter, described: Mapping[str, Any]) -> None:
    """Phi-3's converter writes the factors as tensors, and what queries and keys grow by as a number."""
    turned = int(described["head_dim"] * described["partial_rotary_factor"])
    longest, original = described["max_position_embeddings"], described["original_max_position_embeddings"]
    writer.add_rope_dimension_count(turned)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longest / original) / math.log(original)))
    for side in ("long", "short"):
        factors = np.array(described["rope_scaling"][f"{side}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{side}.weight", factors)


def check(name: str, path: Path) -> None:
    """A file of mlx-lm's network `name` has the network's logits."""
    network, row = write(path, name), bridged.prompts()[0]
    decoder = load("tiny", [str(path)]).decoder
    found = np.array(decoder.logits(decoder(mx.array([row])))[0])
    bridged.assert_close(found, bridged.reference(network, row))


def tensors(network: nn.Module, name: str, parts: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    tied = "output.weight" if name.startswith("gemma") else ""
    for path, array in tree_flatten(network.parameters()):
        renamed = _renamed(path, parts)
        values = np.array(array.astype(mx.float32))
        if name in _PERMUTED and path.endswith(("q_proj.weight", "k_proj.weight")):
            heads = SIZES["num_attention_heads" if "q_proj" in path else "num_key_value_heads"]
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if path.endswith("shared_expert_gate.weight"):
            values = values[0]
        if name.startswith("gemma") and path.endswith("norm.weight"):
            values = values + 1
        if renamed != tied:
            yield renamed, values


def _renamed(path: str, parts: Mapping[str, str]) -> str:
    if path in _ENDS:
        return _ENDS[path]
    path = f"{path}.weight" if path.endswith("sinks") else path
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", path)
    assert found is not None, path
    return f"blk.{found[1]}.{parts[found[2]]}.{found[3]}"


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
    }  # fmt: skip
    kinds[type(value)](key, value)


def placed(shape: tuple[int, ...]) -> TensorInfo:
    """A tensor of which nothing is read."""
    return TensorInfo(shape, gguf.GGMLQuantizationType.F32, 0, 0)


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    plain = kind == "F32" or values.ndim == 1 or name.endswith((".bias", "gate_inp.weight"))
    if plain or values.shape[-1] % gguf.GGML_QUANT_SIZES[quant][0]:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """A vocabulary as Gemma's: no space before a text, marks of turns that the user may write."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n", "\u2581", *letters, "th",
              "the", "\u2581the", "\u2581a"]  # fmt: skip
    tokens = [*pieces, *(f"<unused{number}>" for number in range(VOCAB - len(pieces)))]
    types = [3, 3, 3, 2, 3, 3, 4, *[1] * (len(pieces) - 7), *[4] * (VOCAB - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-number) for number in range(VOCAB)])
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>"
                             "{% endfor %}")  # fmt: skip


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
