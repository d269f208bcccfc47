"""Loading: folders and files, and a clear refusal of everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import tokenizers
from tokenizers import models

from engine.loading import LoadedModel, load
from engine.models.llama import Llama, LlamaArgs
from engine.weights import safetensors
from stoker.errors import ModelError


def config_of(args: LlamaArgs) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden,
        "vocab_size": args.vocab,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.context,
        "hidden_act": "silu",
    }


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Llama) -> Path:
    """The tiny Llama as Hugging Face would store it."""
    weights = {"model.embed_tokens.weight": tiny_llama.embed_tokens.weight, "model.norm.weight": tiny_llama.norm.weight}
    for index, layer in enumerate(tiny_llama.layers):
        weights |= {f"model.{linear.name}.weight": linear.weight.T for linear in layer.linears}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{index}.{name}.weight"] = getattr(layer, name).weight
    assert tiny_llama.lm_head is not None
    weights["lm_head.weight"] = tiny_llama.lm_head.weight.T
    safetensors.write(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tiny_llama.args)))
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def rewrite(folder: Path, change: dict[str, mx.array | None]) -> None:
    weights = safetensors.read(folder / "model.safetensors")
    mx.eval(weights)
    kept = {name: array for name, array in {**weights, **change}.items() if array is not None}
    safetensors.write(folder / "model.safetensors", kept)


def test_a_folder_loads_and_computes_the_same(folder: Path, tiny_llama: Llama) -> None:
    loaded = load("tiny", [str(folder)])
    assert (loaded.kind, loaded.architecture, loaded.context, loaded.name) == ("generate", "llama", 1024, "tiny")
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(loaded.decoder(tokens), tiny_llama(tokens))
    assert loaded.linear_shapes["layers.1.self_attn.k_proj"] == (32, 16)
    assert loaded.linear_shapes["layers.0.mlp.down_proj"] == (48, 32)
    assert len(loaded.linear_shapes) == 14
    assert loaded.bytes == 4 * loaded.parameters
    with pytest.raises(ModelError, match="no embeddings"):
        _ = loaded.encoder


@pytest.mark.parametrize(
    ("change", "cause"),
    [({"model.norm.weight": None}, "'model.norm.weight' of shape (32,) is missing"),
     ({"model.norm.weight": mx.zeros(31)}, "'model.norm.weight' has shape (31,), not (32,)"),
     ({"model.layers.2.mlp.up_proj.weight": mx.zeros((48, 32))}, "model.layers.2.mlp.up_proj.weight"),
     ({"model.layers.0.self_attn.q_proj.bias": mx.zeros(32)}, "1 tensors that this architecture does not have")],
)  # fmt: skip
def test_missing_surplus_and_misshapen_tensors_are_named(
    folder: Path, change: dict[str, mx.array | None], cause: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError) as caught:
        load("tiny", [str(folder)])
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("config", "cause"),
    [("{}", "None is not supported; bert, llama are"), ('{"model_type": "mamba"}', "'mamba' is not supported"),
     ("[", "config.json"), ("[]", "not a JSON object"), (None, "no config.json")],
)  # fmt: skip
def test_what_is_no_supported_model_is_refused(folder: Path, config: str | None, cause: str) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=cause):
        load("tiny", [str(folder)])


def test_a_file_that_is_no_gguf_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="a model is a folder"):
        load("tiny", [str(folder / "model.safetensors")])


def test_bert_loads_with_its_prefix_too(minilm: LoadedModel, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((minilm.path / file).read_bytes())
    weights = safetensors.read_folder(minilm.path)
    safetensors.write(tmp_path / "model.safetensors", {f"bert.{name}": array for name, array in weights.items()})
    tokens = mx.array([[101, 4010, 102]])
    assert mx.array_equal(load("prefixed", [str(tmp_path)]).encoder(tokens), minilm.encoder(tokens))


def test_real_models_say_what_they_are(minilm: LoadedModel, smollm2: LoadedModel) -> None:
    assert (minilm.kind, minilm.context, len(minilm.linear_shapes)) == ("embed", 256, 0)
    assert (smollm2.kind, smollm2.context, smollm2.parameters) == ("generate", 8192, 134_515_008)


def test_everything_runs_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from engine.loading import load; import mlx.core as mx\n"
        "model = load('tiny', [sys.argv[1]]).decoder\n"
        "print(mx.isfinite(model.logits(model(mx.array([[1, 2, 3]])))).all().item())"
    )
    (tmp_path / "kernels").mkdir()
    for compiler in (None, "#!/bin/sh\nexit 1\n"):
        tools = tmp_path / ("broken" if compiler else "none")
        tools.mkdir()
        if compiler:
            (tools / "g++").write_text(compiler)
            (tools / "g++").chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env={**os.environ, "PATH": str(tools), "TMPDIR": str(tmp_path / "kernels"), "STOKER_BLAS": "off"},
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.strip() == "True", done.stderr
