"""GGUF files of architectures beyond the Llama family: the same numbers as mlx-lm's network of the same weights has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.verifying import verify
from engine.models.bridge import gguf_configs, gguf_models
from engine.weights.gguf import GGUF
from stoker.errors import ModelError
from tests.engine import bridged, gguf_files, tiny


def opened(path: Path, **options: Any) -> LoadedModel:
    return load("tiny", [str(path)], **options)


def logits(model: LoadedModel) -> np.ndarray:
    return np.array(model.decoder.logits(model.decoder(mx.array([bridged.prompts()[0]])))[0])


@pytest.mark.parametrize("name", gguf_files.LAYOUTS)
def test_logits_are_those_of_the_same_weights_in_mlx_lm(name: str, tmp_path: Path) -> None:
    gguf_files.check(name, tmp_path / "tiny.gguf")
    found = inspect(tmp_path / "tiny.gguf")
    assert (found.kind, found.architecture) == ("generate", name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gemma3_text", "Q8_0"), ("qwen3_moe", "Q4_0"), ("mixtral", "Q4_1"), ("gpt_oss", "MXFP4"), ("phi3", "MXFP4")],
)
def test_kept_blocks_compute_what_they_dequantize_to(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, name, kind)
    kept, dense = opened(path, quantize="keep"), opened(path)
    assert kept.parameters == dense.parameters
    assert kept.bytes < 0.7 * dense.bytes
    assert kept.linear_shapes == dense.linear_shapes
    assert np.abs(logits(kept) - logits(dense)).max() < 1e-3


def test_kept_blocks_may_be_computed_in_16_bits_and_fewer_bits_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, "gemma3_text", "Q8_0")
    kept = opened(path, quantize="keep")
    half = opened(path, quantize="keep", dtype="float16")
    assert half.decoder(mx.array([[2, 9]])).dtype == mx.float16
    fewer = opened(path, quantize="4bit", group_size=32)
    assert fewer.bytes < 0.8 * kept.bytes


def test_blocks_without_a_form_of_mlx_are_rounded_to_8_bits_where_they_are_to_stay_few(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, "gemma3_text", "Q5_0")
    kept, dense = opened(path, quantize="keep"), opened(path)
    assert kept.bytes < dense.bytes / 2
    name = "layers.1.self_attn.q_proj"
    found, rounded = (model.decoder.linears[name].dense() for model in (dense, kept))
    assert 0 < tiny.largest(found - rounded) < tiny.largest(found) / 100


def test_a_file_is_inspected_and_verified(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf", "gemma3_text")
    found = verify(tmp_path / "tiny.gguf").inspection
    assert (found.kind, found.architecture, found.layers, found.dim) == ("generate", "gemma3_text", 4, 32)
    assert found.chat_template


def test_a_text_begins_without_a_space_and_marks_of_turns_are_single_tokens(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf", "gemma3_text")
    tokenizer = opened(tmp_path / "tiny.gguf").tokenizer
    ids = tokenizer.encode("<start_of_turn>the the\n<end_of_turn>")
    assert [tokenizer.inner.id_to_token(index) for index in ids] == [
        "<bos>", "<start_of_turn>", "the", "\u2581the", "\n", "<end_of_turn>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "the the\n"
    assert tokenizer.inner.token_to_id("<end_of_turn>") in tokenizer.eos_ids


def described(architecture: str, **changed: Any) -> dict[str, Any]:
    """The config.json of a file with these keys."""
    file = GGUF.__new__(GGUF)
    file.path, file.tensors = Path("some.gguf"), {}
    file.tensors["token_embd.weight"] = gguf_files.placed((67, 32))
    sizes = {"embedding_length": 32, "block_count": 4, "attention.head_count": 4, "attention.key_length": 6,
             "feed_forward_length": 48, "context_length": 256, "attention.layer_norm_rms_epsilon": 1e-6}  # fmt: skip
    keys = {**sizes, **{key.replace("__", "."): value for key, value in changed.items()}}
    file.metadata = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    file.metadata["general.architecture"] = architecture
    model = gguf_models.model_of(file.metadata)
    assert model is not None
    return gguf_configs.config_of(file, model)


def test_what_no_key_of_gemma_3_says_is_as_in_llama_cpp() -> None:
    usual = described("gemma3", attention__sliding_window=8)
    assert (usual["sliding_window_pattern"], usual["rope_local_base_freq"]) == (6, 10_000.0)
    assert usual["query_pre_attn_scalar"] == 6
    assert described("gemma3", attention__sliding_window=8, block_count=62)["query_pre_attn_scalar"] == 8
    assert described("gemma2", block_count=46)["query_pre_attn_scalar"] == 8
    assert described("gemma3")["sliding_window_pattern"] == 1, "no window: each layer sees all"


def test_what_no_key_of_granite_says_scales_nothing() -> None:
    usual = described("granite")
    assert [usual[f"{part}_multiplier"] for part in ("embedding", "residual")] == [1.0, 1.0]
    assert (usual["attention_multiplier"], usual["logits_scaling"]) == (6**-0.5, 1.0)


def test_a_pattern_of_windows_may_be_a_number_or_a_list() -> None:
    pattern = "attention__sliding_window_pattern"
    listed = described("gemma3", attention__sliding_window=8, **{pattern: [True, True, False, True]})
    assert listed["sliding_window_pattern"] == 3
    assert described("gemma3", attention__sliding_window=8, **{pattern: 2})["sliding_window_pattern"] == 2
    with pytest.raises(ModelError, match=r"gemma3\.attention\.sliding_window_pattern = .*False, True.* not supported"):
        described("gemma3", attention__sliding_window=8, **{pattern: [False, True, False]})


def test_what_no_key_of_a_mixture_says_is_as_in_llama_cpp() -> None:
    experts = {"expert_count": 8, "expert_used_count": 2}
    for architecture in ("qwen2moe", "qwen3moe"):
        assert described(architecture, **experts)["moe_intermediate_size"] == 24, "shared by those that are used"
    assert described("qwen2moe", **experts)["shared_expert_intermediate_size"] == 48
    assert described("qwen3moe", **experts)["norm_topk_prob"]
    with pytest.raises(ModelError, match=r"qwen3moe\.expert_count is missing"):
        described("qwen3moe")


def test_positions_of_gpt_oss_are_stretched_without_whole_borders() -> None:
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 64}
    experts = {"expert_count": 8, "expert_used_count": 2, "attention.sliding_window": 8}
    found = described("gpt-oss", **scaling, **experts)["rope_scaling"]
    assert (found["rope_type"], found["factor"], found["original_max_position_embeddings"]) == ("yarn", 32.0, 64)
    assert found["truncate"] is False


def test_phi_3_without_factors_has_plain_positions() -> None:
    found = described("phi3", **{"rope.dimension_count": 4})
    assert "rope_scaling" not in found
    assert found["partial_rotary_factor"] == 4 / 6


def test_scaled_positions_of_gemma_3_are_those_of_its_other_layers() -> None:
    scaled = described("gemma3", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert scaled["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"attention.scale": 0.5}, "the field gemma3.attention.scale = 0.5 is not supported"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "rope.scaling.type = yarn is not supported: none"),
        ({"attention.value_length": 7}, "attention.value_length = 7 is not supported; only 6 is"),
        ({"rope.dimension_count": 4}, "rope.dimension_count = 4 is not supported; only 6 is"),
        ({"attention.head_count": [4, 4, 4, 4]}, r"attention.head_count is \[4, 4, 4, 4\], not a positive integer"),
        ({"embedding_length": None}, "embedding_length is missing; a positive integer is needed"),
        ({"expert_count": 4}, "expert_count = 4 is not supported"),
    ],
)
def test_what_nothing_here_asks_for_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        described("gemma3", **changed)


def without(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_tensor(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__setitem__(name, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("blk.3.post_ffw_norm.weight"), "Missing 1 parameters: model.layers.3.post_feedforward_layernorm"),
        (with_tensor("blk.0.attn_q.weight", 32, 24), r"'blk.0.attn_q.weight' has shape \(32, 24\), not \(32, 32\)"),
        (with_tensor("v.patch_embd.weight", 3, 3), "1 tensors that this architecture does not have: v.patch_embd"),
        (with_tensor("blk.4.attn_q.weight", 32, 32), "1 tensors that this architecture does not have: blk.4.attn_q"),
        (without("token_embd.weight"), "'token_embd.weight' is missing"),
    ],
    ids=["missing", "shape", "eyes", "layer", "embedding"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, np.ndarray]], None], words: str, tmp_path: Path
) -> None:
    gguf_files.write(tmp_path / "tiny.gguf", "gemma3_text", change=change)
    for look in (opened, verify):
        with pytest.raises(ModelError, match=words) as caught:
            look(tmp_path / "tiny.gguf")
        assert str(caught.value).count("tiny.gguf") == 1


def test_an_architecture_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "bert")
    for key in ("embedding_length", "attention.head_count", "block_count", "context_length"):
        writer.add_uint32(f"bert.{key}", 4)
    gguf_files.finish(writer)
    for look in (opened, verify):
        with pytest.raises(ModelError, match=r"'bert' is not supported in GGUF; llama, .*gemma3"):
            look(tmp_path / "other.gguf")
    assert not inspect(tmp_path / "other.gguf").supported
