"""Configs and names of tensors, read as transformers reads them or refused by name: goldens by `goldens/configs.py`."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import load
from engine.checkpoints.quantizing import quantize_folder
from engine.checkpoints.verifying import verify
from engine.models.llama import LlamaArgs
from engine.models.mistral import MistralArgs
from engine.models.qwen2 import Qwen2Args
from engine.models.qwen3 import Qwen3Args
from engine.weights import safetensors
from engine.weights.names import canonical
from stoker.errors import ModelError

GOLDENS = Path(__file__).parents[1] / "goldens"
CHECKPOINTS = GOLDENS / "architectures"
CASES: dict[str, Any] = json.loads((GOLDENS / "configs.json").read_text())["cases"]
CLOSE = 2e-4
Arrays = dict[str, mx.array]


def older_norms(arrays: Arrays) -> Arrays:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in arrays.items()
    }


def before_all(prefix: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {prefix + name: array for name, array in arrays.items()}


def without_body(arrays: Arrays) -> Arrays:
    return {name.removeprefix("model."): array for name, array in arrays.items()}


def own_head(arrays: Arrays) -> Arrays:
    return {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"][::-1]}


def head_alone(arrays: Arrays) -> Arrays:
    return {name.replace("model.embed_tokens", "lm_head"): array for name, array in arrays.items()}


#: As in `goldens/configs.py`.
TENSORS: dict[str, Callable[[Arrays], Arrays]] = {
    "own-head": own_head,
    "head-alone": head_alone,
    "no-prefix": without_body,
    "gamma-beta": older_norms,
    "prefix-gamma-beta": lambda arrays: before_all("mpnet.")(older_norms(arrays)),
}


def copied(name: str, to: Path, change: dict[str, Any] | None = None, tensors: Any = None) -> Path:
    """The checkpoint `name` in the folder `to`, with fields of its config and its tensors changed."""
    shutil.copytree(CHECKPOINTS / name, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **(change or {})}))
    if tensors is not None:
        arrays = safetensors.read(to / "model.safetensors")
        mx.eval(arrays)
        safetensors.write(to / "model.safetensors", tensors(arrays))
    return to


def config_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CHECKPOINTS / name / "config.json").read_text())
    return content


def outputs(folder: Path, name: str) -> np.ndarray:
    """What the model in `folder` makes of the first row of the checkpoint `name`."""
    tokens = mx.array(np.load(GOLDENS / "architectures.npz")[f"{name}.tokens.0"])[None]
    model = load("it", [str(folder)])
    result = model.encoder(tokens) if model.kind == "embed" else model.llama.logits(model.llama(tokens))
    return np.array(result[0])


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_computes_is_computed(tmp_path: Path, case: str) -> None:
    name, change = CASES[case]["checkpoint"], CASES[case]["change"]
    folder = copied(name, tmp_path / "model", change, TENSORS.get(case))
    wanted = np.load(GOLDENS / "configs.npz")[case]
    assert np.abs(outputs(folder, name)[-len(wanted) :] - wanted).max() < CLOSE
    verify(folder)


def test_an_absent_field_is_transformers_default() -> None:
    def args(kind: type[LlamaArgs], name: str, *absent: str, **change: object) -> LlamaArgs:
        config = {key: value for key, value in config_of(name).items() if key not in absent}
        return kind.from_config({**config, **change})

    assert args(MistralArgs, "mistral", "sliding_window").window == 4096
    assert args(MistralArgs, "mistral", sliding_window=None).window is None
    sliding = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
    assert args(Qwen2Args, "qwen2-tied", "sliding_window", **sliding).window == 4096
    assert args(Qwen2Args, "qwen2-tied", "sliding_window", "use_sliding_window").window is None
    assert args(MistralArgs, "mistral", "num_key_value_heads", num_attention_heads=16).kv_heads == 8
    assert args(Qwen3Args, "qwen3", "num_key_value_heads", num_attention_heads=64).kv_heads == 32
    assert args(Qwen2Args, "qwen2-tied", num_key_value_heads=None).kv_heads == 4
    assert args(LlamaArgs, "llama-llama3", "num_key_value_heads").kv_heads == 4
    contexts = [(MistralArgs, "mistral", 131_072), (Qwen3Args, "qwen3", 32_768), (LlamaArgs, "llama-linear", 2048)]
    for kind, name, context in contexts:
        assert args(kind, name, "max_position_embeddings").context == context
    assert args(Qwen3Args, "qwen3", "head_dim").head_dim == 128
    assert args(MistralArgs, "mistral", "head_dim").head_dim == 8
    assert args(LlamaArgs, "llama-llama3", "rope_parameters").rope_base == 10_000.0


def test_inspecting_takes_the_same_defaults(tmp_path: Path) -> None:
    folder = copied("mistral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    absent = ("sliding_window", "max_position_embeddings", "num_key_value_heads")
    (folder / "config.json").write_text(json.dumps({key: each for key, each in config.items() if key not in absent}))
    found = inspect(folder)
    assert found.notes == ("a sliding window of 4096 tokens",)
    assert found.context == 131_072
    assert found.cache_bytes_per_1000 == {"16 bit": 2000 * 2 * 2 * 8 * 8, "32 bit": 4000 * 2 * 2 * 8 * 8}


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [("llama-llama3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0"),
     ("llama-llama3", {"residual_multiplier": 0.5}, "residual_multiplier"),
     ("llama-llama3", {"is_causal": False}, "is_causal"),
     ("llama-llama3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
     ("llama-llama3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
     ("llama-llama3", {"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config"),
     ("llama-llama3", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "auto_map"),
     ("llama-llama3", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
     ("llama-llama3", {"pretraining_tp": 2, "mlp_bias": 1}, "mlp_bias"),
     ("mistral", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
     ("mistral", {"sliding_window": True}, "sliding_window"),
     ("qwen2-tied", {"use_sliding_window": "yes"}, "use_sliding_window"),
     ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "by layer type"),
     ("qwen3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, '"longrope"'),
     ("qwen3", {"rope_parameters": {"rope_type": "proportional"}}, '"proportional"'),
     ("qwen3", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
     ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "type": "yarn"}}, "type"),
     ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "rope_theta"),
     ("qwen3", {"rope_parameters": {"rope_type": ["yarn"]}}, r'rope_parameters: rope_type = \["yarn"\] is not'),
     ("llama-llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "low_freq_factor 4.0 must be below"),
     ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
     ("bert", {"is_decoder": True}, "is_decoder"),
     ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
     ("bert", {"embedding_size": 16}, "embedding_size"),
     ("mpnet", {"chunk_size_feed_forward": 7}, "chunk_size_feed_forward"),
     ("mpnet", {"type_vocab_size": 2}, "type_vocab_size")],
)  # fmt: skip
def test_a_field_that_asks_for_something_else_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, Any], cause: str
) -> None:
    folder = copied(name, tmp_path / "model", change)
    with pytest.raises(ModelError, match=cause):
        load("it", [str(folder)])


def test_further_fields_of_real_checkpoints_change_nothing(tmp_path: Path) -> None:
    said = {
        "_name_or_path": "HuggingFaceTB/x", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
        "transformers.js_config": {"dtype": "fp16"}, "torch_dtype": "bfloat16", "temperature": 0.5, "top_k": 7,
        "unsloth_version": "2025.1", "id2label": {"0": "A"}, "label2id": {"A": 0}, "quantization_config": None,
        "own": None,
    }  # fmt: skip
    folder = copied("llama-llama3", tmp_path / "llama", said)
    assert np.array_equal(outputs(folder, "llama-llama3"), outputs(CHECKPOINTS / "llama-llama3", "llama-llama3"))
    said = {"gradient_checkpointing": False, "position_embedding_type": "absolute", "directionality": "bidi",
            "pooler_fc_size": 768, "output_past": True, "is_matryoshka": False}  # fmt: skip
    folder = copied("bert", tmp_path / "bert", said)
    assert np.array_equal(outputs(folder, "bert"), outputs(CHECKPOINTS / "bert", "bert"))


def test_keys_of_a_gguf_that_nobody_knows_are_refused() -> None:
    sizes = {"block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4,
             "context_length": 128, "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 64}  # fmt: skip
    metadata = {f"llama.{name}": value for name, value in sizes.items()} | {"general.name": "x", "split.count": 0}
    assert LlamaArgs.from_gguf(metadata, vocab=64, tied=True).layers == 2
    for key, value in (("logit_scale", 2.0), ("attn_logit_softcapping", 1.0), ("attention.causal", False)):
        with pytest.raises(ModelError, match=f"llama.{key}"):
            LlamaArgs.from_gguf({**metadata, f"llama.{key}": value}, vocab=64, tied=True)


@pytest.mark.parametrize("prefix", ["0.auto_model.", "0.auto_model.bert.", "transformer.", "module.bert.", "bert."])
def test_what_stands_before_every_tensor_is_no_matter(tmp_path: Path, prefix: str) -> None:
    folder = copied("bert", tmp_path / "model", None, before_all(prefix))
    assert np.array_equal(outputs(folder, "bert"), outputs(CHECKPOINTS / "bert", "bert"))
    verify(folder)


def test_a_decoder_may_be_wrapped_with_its_head(tmp_path: Path) -> None:
    folder = copied("llama-llama3", tmp_path / "model", None, before_all("module."))
    assert np.array_equal(outputs(folder, "llama-llama3"), outputs(CHECKPOINTS / "llama-llama3", "llama-llama3"))


@pytest.mark.parametrize(
    ("name", "tensors", "cause"),
    [("bert", lambda a: {**a, "embeddings.LayerNorm.gamma": a["embeddings.LayerNorm.weight"]}, "are the same one"),
     ("bert", lambda a: {**before_all("query.")(a), **before_all("context.")(a)}, r"word_embeddings\.weight'"),
     ("bert", lambda a: {**a, "2.linear.weight": mx.zeros((4, 4))}, r"2\.linear\.weight"),
     ("bert", lambda a: {**a, "encoder.layer.0.cls.bias": mx.zeros(4)}, r"encoder\.layer\.0\.cls\.bias"),
     ("llama-llama3", lambda a: {**a, "model.layers.0.self_attn.q_proj.bias": mx.zeros(32)}, r"q_proj\.bias"),
     ("llama-llama3", lambda a: {n: x for n, x in a.items() if n != "lm_head.weight"}, r"'lm_head\.weight'"),
     ("llama-linear", lambda a: {**a, "lm_head.weight": mx.zeros((32, 32))}, r"'lm_head\.weight' has shape"),
     ("llama-linear", lambda a: {n: x for n, x in a.items() if "embed" not in n}, r"'model\.embed_tokens\.weight'")],
)  # fmt: skip
def test_missing_and_unexpected_tensors_are_refused_by_name(
    tmp_path: Path, name: str, tensors: Callable[[Arrays], Arrays], cause: str
) -> None:
    folder = copied(name, tmp_path / "model", None, tensors)
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(folder)


def test_names_are_left_alone_where_they_are_right() -> None:
    decoder = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
    assert canonical(decoder, "llama") == {name: name for name in decoder}
    assert canonical(["x"], "bert") == {"x": "x"}
    two = [f"{start}layers.0.input_layernorm.weight" for start in ("one.", "two.")]
    assert canonical(two, "llama") == {name: name for name in two}, "neither is taken for the body"


def test_a_second_copy_of_a_tied_head_takes_no_memory(tmp_path: Path) -> None:
    folder = copied("llama-linear", tmp_path, None, lambda a: {**a, "lm_head.weight": a["model.embed_tokens.weight"]})
    model = load("it", [str(folder)])
    assert model.llama.lm_head is None
    assert model.bytes == load("it", [str(CHECKPOINTS / "llama-linear")]).bytes
    assert np.array_equal(outputs(folder, "llama-linear"), outputs(CHECKPOINTS / "llama-linear", "llama-linear"))


@pytest.mark.parametrize("tensors", [own_head, head_alone, without_body])
def test_a_quantized_copy_is_of_the_same_model(tmp_path: Path, tensors: Callable[[Arrays], Arrays]) -> None:
    folder = copied("llama-linear", tmp_path / "model", None, tensors)
    config = json.loads((quantize_folder(folder, tmp_path / "small", 8, 32).path / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tensors is not own_head), "mlx-lm drops the head of a tied model"
    apart = np.abs(outputs(tmp_path / "small", "llama-linear") - outputs(folder, "llama-linear")).max()
    assert apart < 2.0, "another head is 20 away"


@pytest.mark.parametrize("change", [{"head_dim": 2**30}, {"vocab_size": 2**30}, {"num_hidden_layers": 2**30},
                                    {"num_attention_heads": 2**30}, {"intermediate_size": 2**30}])  # fmt: skip
def test_absurd_sizes_are_held_against_the_file_before_anything_is_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    """A table of 2^29 frequencies would take 4 GB."""
    real = np.arange

    def small(*arguments: Any, **options: Any) -> Any:
        assert all(abs(each) < 2**20 for each in arguments), "made before the file was looked at"
        return real(*arguments, **options)

    folder = copied("llama-llama3", tmp_path, change)
    monkeypatch.setattr(np, "arange", small)
    with pytest.raises(ModelError, match=r"has shape|is missing|multiple"):
        load("it", [str(folder)])


#: Every file that a model's folder may have.
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "modules.json",
)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, file: str, kind: str) -> None:
    path = copied("llama-llama3", tmp_path) / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for check in (verify, lambda folder: load("it", [str(folder)])):
        with pytest.raises(ModelError, match=f"{file}: neither a file"):
            check(tmp_path)


@pytest.mark.parametrize("file", [name for name in FILES if name.endswith(".json")])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5_000 + "}", "\udcff\udcfe"])
def test_json_beyond_all_bounds_is_refused_by_its_file(tmp_path: Path, file: str, content: str) -> None:
    path = copied("llama-llama3", tmp_path) / file
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=re.escape(file)):
        load("it", [str(tmp_path)])


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        path = copied("llama-llama3", tmp_path / file) / file
        with path.open("wb") as sparse:
            sparse.truncate(1 << 40)
        with pytest.raises(ModelError, match=f"{file}: more than"):
            load("it", [str(tmp_path / file)])


def test_a_config_of_endless_depth_is_refused(tmp_path: Path) -> None:
    path = copied("llama-llama3", tmp_path) / "config.json"
    path.write_text('{"rope_parameters": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ModelError, match=r"config\.json: not readable as JSON"):
        load("it", [str(tmp_path)])
