"""The same checkpoints as GGUF files, as llama.cpp's converter lays them out: names, row orders, biases, factors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel, load
from engine.models import rope
from engine.models.layers import Linear, QuantizedLinear
from engine.models.llama import LlamaArgs
from engine.weights import safetensors
from stoker.errors import ModelError
from tests.engine.tiny import largest

GOLDENS = Path(__file__).parents[1] / "goldens"
CHECKPOINTS = GOLDENS / "architectures"
#: Ours to GGUF's.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rotary pairs: row i of a head's first half, then row i of its second."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, inner = stem.split(".", 3)
        return f"blk.{index}.{NAMES[inner]}.{part}"
    return f"{NAMES[stem]}.{part}"


def write_gguf(name: str, path: Path, kind: str = "F32", **extra: Any) -> Path:
    loaded = load(name, [str(CHECKPOINTS / name)])
    args, architecture = loaded.llama.args, loaded.architecture
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(args.context)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(args.hidden)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_rope_freq_base(args.rope_base)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    if isinstance(args.rope_scaling, rope.LinearScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(args.rope_scaling.factor)
    if isinstance(args.rope_scaling, rope.Llama3):
        plain = args.rope_base ** (np.arange(0, args.head_dim, 2) / args.head_dim)
        factors = rope.periods(args.head_dim, args.rope_base, args.rope_scaling) / plain
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for key, value in extra.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    add_tokenizer(writer, CHECKPOINTS / name)
    for tensor, array in safetensors.read_folder(CHECKPOINTS / name).items():
        values = np.array(array.astype(mx.float32))
        heads = {"q_proj": args.heads, "k_proj": args.kv_heads}.get(tensor.split(".")[-2])
        if heads and architecture == "llama":
            values = permuted(values, heads)
        if kind != "F32" and values.ndim == 2:
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(tensor), gguf.quants.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(gguf_name(tensor), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 2 else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(2)


def opened(path: Path, **options: Any) -> LoadedModel:
    return load("tiny", [str(path)], **options)


@pytest.mark.parametrize("name", ["llama-llama3", "llama-linear", "qwen2-tied", "qwen2-untied", "qwen3"])
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    loaded = opened(write_gguf(name, tmp_path / "tiny.gguf"))
    content = np.load(GOLDENS / "architectures.npz")
    tokens, wanted = content[f"{name}.tokens.0"], content[f"{name}.output.0"]
    logits = loaded.llama.logits(loaded.llama(mx.array(tokens[None])))
    assert np.abs(np.array(logits[0]) - wanted).max() < 2e-4
    assert loaded.architecture == name.partition("-")[0]


@pytest.mark.parametrize("name", ["llama-llama3", "qwen2-untied"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16"])
def test_kept_blocks_compute_what_they_dequantize_to(tmp_path: Path, name: str, kind: str) -> None:
    path = write_gguf(name, tmp_path / "tiny.gguf", kind)
    kept, dense = opened(path, quantize="keep").llama, opened(path).llama
    tokens = mx.array([[7, 9, 11, 13, 40, 41, 63, 5]])
    difference = largest(kept.logits(kept(tokens)) - dense.logits(dense(tokens)))
    layer = kept.layers[0].self_attn.q_proj
    if kind == "F16":
        assert type(layer) is Linear, "plain numbers stay dense"
        assert difference == 0
    elif kind == "Q5_0":
        assert isinstance(layer, QuantizedLinear)
        assert layer.quantized.bits == 8, "what MLX has no exact form for is rounded once more, to 8 bits"
        error = largest(layer.dense() - dense.layers[0].self_attn.q_proj.weight)
        assert error < 0.02
    else:
        assert isinstance(layer, QuantizedLinear)
        assert layer.quantized.bits == int(kind[1])
        assert difference < 1e-3
        assert largest(layer.dense() - dense.layers[0].self_attn.q_proj.weight) < 1e-6
    assert type(dense.layers[0].self_attn.q_proj) is Linear


def test_fewer_bits_than_the_file_has_may_be_asked_for(tmp_path: Path) -> None:
    path = write_gguf("llama-llama3", tmp_path / "tiny.gguf", "Q8_0")
    layer = opened(path, quantize="4bit", group_size=32).llama.layers[1].mlp.down_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.quantized.bits == 4


def test_a_stated_sliding_window_is_honoured(tmp_path: Path) -> None:
    path = write_gguf("llama-linear", tmp_path / "tiny.gguf", attention__sliding_window=8)
    assert opened(path).llama.args.window == 8


@pytest.mark.parametrize(
    "key",
    [
        "attention.value_length", "rope.dimension_count", "attention.sliding_window", "expert_count", "pooling_type",
        "attention.causal", "tensor_data_layout", "rope.scaling.type", "rope.scaling.attn_factor", "unknown.key",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [[1, 2], [1], ["a", "b"]])
def test_a_list_where_a_gguf_has_one_value_is_refused_by_name(tmp_path: Path, key: str, value: list[Any]) -> None:
    path, name = tmp_path / "list.gguf", "llama-llama3" if key.startswith("rope.scaling") else "llama-linear"
    twice = {"attention.value_length": "add_value_length"}.get(key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, twice or "add_nothing", lambda *_: None, raising=False)
        write_gguf(name, path, "F32", **{key.replace(".", "__"): value})
    with pytest.raises(ModelError, match=re.escape(f"llama.{key}")):
        opened(path)


def test_a_gguf_with_a_huge_list_of_settings_is_refused(tmp_path: Path) -> None:
    path = write_gguf("llama-linear", tmp_path / "huge.gguf", unknown__key=[1] * 70_000)
    with pytest.raises(ModelError, match=r"unknown\.key' has 70000 numbers; 65536 are allowed"):
        opened(path)


def test_a_gguf_beyond_the_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"qwen2\.expert_count = 8 is not supported"):
        opened(write_gguf("qwen2-tied", tmp_path / "experts.gguf", expert_count=8))
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' is not supported in GGUF; llama, qwen2, qwen3, gemma"):
        opened(tmp_path / "mamba.gguf")


def test_rows_that_fit_no_heads_are_refused() -> None:
    from engine.weights.gguf_names import unpermute

    with pytest.raises(ModelError, match="10 rows"):
        unpermute(np.zeros((10, 4)), 4)
    assert LlamaArgs.gguf_permuted
