"""Loading: folders and files, and a clear refusal of everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import tokenizers
from tokenizers import models

from engine.checkpoints.loading import LoadedModel, load
from engine.models.llama import Llama, LlamaArgs
from engine.weights import safetensors
from engine.weights.digest import weights_digest
from stoker.errors import ModelError
from tests.engine import tiny


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
    # Its matrices lie in another order, so sums are rounded in another one.
    assert mx.allclose(loaded.decoder(tokens), tiny_llama(tokens), rtol=0, atol=1e-5)
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


def test_a_tokenizer_may_have_as_many_tokens_as_the_model_and_no_more(folder: Path) -> None:
    tiny.tokenizer(61).inner.save(str(folder / "tokenizer.json"))
    assert load("tiny", [str(folder)]).tokenizer.vocab_size == 61
    tiny.tokenizer(62).inner.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="the tokenizer has 62 tokens, the model only 61"):
        load("tiny", [str(folder)])


@pytest.mark.parametrize(
    ("config", "cause"),
    [("{}", "null is not supported. albert, bert, camembert, deberta-v2, distilbert, electra, gte, llama, mistral, "),
     ('{"model_type": "t5"}', '"t5" generates no text here; its encoder makes vectors'),
     ('{"model_type": "canine"}', '"canine" is not supported'),
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
    assert [model.card((model.kind,)).chat for model in (smollm2, minilm)] == [True, False]
    assert not replace(smollm2, tokenizer=minilm.tokenizer).card(("generate",)).chat, "it has no template"


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, 2 << 20, (3 << 20) - 1])
def test_a_digest_distinguishes_models_by_both_ends_and_the_size(tmp_path: Path, place: int) -> None:
    content = bytearray(3 << 20)
    (tmp_path / "a.gguf").write_bytes(content)
    same = weights_digest(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(content)
    assert weights_digest(tmp_path / "b.gguf") == same
    content[place] = 1
    (tmp_path / "b.gguf").write_bytes(content)
    assert weights_digest(tmp_path / "b.gguf") != same
    (tmp_path / "b.gguf").write_bytes(bytes(len(content) + 1))
    assert weights_digest(tmp_path / "b.gguf") != same


def test_a_base_has_the_name_that_earlier_releases_gave_it(tmp_path: Path) -> None:
    """Adapters and checkpoints on disk name their base by it: under another name all of them would be refused."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, size in (("model-00001-of-00002", 3 << 20), ("model-00002-of-00002", 5)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(range(256)) * (size // 256) or b"short")
    (tmp_path / "README.md").write_text("no part of it")
    assert weights_digest(tmp_path) == "ff04dc40bde9f9da"


def test_everything_runs_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from engine.checkpoints.loading import load; import mlx.core as mx\n"
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
            env={**os.environ, "PATH": str(tools), "TMPDIR": str(tmp_path / "kernels")},
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.strip() == "True", done.stderr


MEASURE = """
import resource, sys
from engine.platform import blas; blas.boot(1)
import mlx.core as mx
from engine.checkpoints.loading import load
def peak():
    if sys.platform == 'darwin':
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss here: it starts at what the parent process had.
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM'))
tiny = load('tiny', [sys.argv[1]])  # loads what is loaded once: libraries, kernels
if sys.platform == 'linux':
    open('/proc/self/clear_refs', 'w').write('5')  # the peak starts again at what is resident now
before = peak()
mx.reset_peak_memory()
options = {'quantize': sys.argv[3]} if sys.argv[3] != '-' else {}
loaded = load('large', [sys.argv[2]], **options)
print(loaded.bytes, mx.get_peak_memory() - tiny.bytes, peak() - before)
"""


def large_folder(folder: Path, small: Path) -> Path:
    """21 million weights in bfloat16: a vocabulary that is large for the rest, as in small models, and a head."""
    args = LlamaArgs(
        layers=6, dim=320, hidden=1024, heads=5, kv_heads=5, head_dim=64, vocab=20_000, context=512,
        rope_base=1e4, norm_eps=1e-5, tied=False,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(args)))
    (folder / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    shapes = {"model.embed_tokens": (20_000, 320), "lm_head": (20_000, 320), "model.norm": (320,)}
    for index in range(6):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{part}_proj": (320, 320) for part in "qkvo"}
        shapes |= {f"{layer}.mlp.{part}_proj": (1024, 320) for part in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (320, 1024)}
        shapes |= {f"{layer}.{part}_layernorm": (320,) for part in ("input", "post_attention")}
    weights = {f"{name}.weight": mx.ones(shape, mx.bfloat16) * 0.01 for name, shape in shapes.items()}
    safetensors.write(folder / "model.safetensors", weights)
    return folder


@pytest.mark.parametrize("quantize", ["-", "8bit"])
def test_loading_takes_little_more_memory_than_the_weights(folder: Path, tmp_path: Path, quantize: str) -> None:
    large = large_folder(tmp_path / "large", folder)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(large), quantize],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, peak, resident = map(int, done.stdout.split())
    assert peak < 1.3 * weights, "by MLX's own count"
    # The process also maps what it computes with; a second copy of the weights would show all the same.
    assert resident < 1.3 * weights + 30e6, "by the system's"
    if quantize == "-":
        assert resident > weights / 4, "the measurement is blind"
    print(f"{quantize}: {weights / 1e6:.0f} MB, peak {peak / weights:.2f} x, resident {resident / weights:.2f} x")
