"""Matrices of few bits: the layers, the layout of mlx-lm, quantizing on load and on disk."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.quantizing import quantize_folder
from engine.checkpoints.recipes import RECIPES, Recipe
from engine.models.bridge import package
from engine.models.key_values import KeyValues
from engine.models.layers import Linear, QuantizedEmbedding, QuantizedLinear
from engine.models.llama import Llama
from engine.weights import mlx_layout, safetensors
from engine.weights.quantized import SMALL_FLOATS, Form, QuantizedTensor, dequantize, quantize
from stoker.errors import ModelError
from tests import powercut
from tests.engine import cached
from tests.engine.tiny import largest

CHECKPOINTS = Path(__file__).parents[1] / "goldens" / "architectures"
TOKENS = mx.array([[7, 9, 11, 13, 40, 41, 63, 5]])


def opened(path: Path, **options: object) -> LoadedModel:
    return load("tiny", [str(path)], **options)  # type: ignore[arg-type]


def logits(model: Llama) -> np.ndarray:
    return np.array(model.logits(model(TOKENS)))


def spread(one: Llama, other: Llama) -> float:
    return float(np.abs(logits(one) - logits(other)).max())


def rewrite(path: Path, **change: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four bits in groups of 32, as `quantize_folder` writes it."""
    return quantize_folder(CHECKPOINTS / "qwen2-untied", tmp_path / "q4", bits=4, group_size=32).path


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_matrix_survives_to_half_a_step(bits: int, group_size: int) -> None:
    array = mx.random.normal((7, 256), key=mx.random.key(1))
    stored = quantize(array, Form(group_size, bits))
    assert (stored.shape, stored.size) == ((7, 256), 7 * 256)
    step = np.repeat(np.abs(np.array(stored.scales)), group_size, axis=1)
    # MLX moves a group's ends a little, so that zero stays zero.
    assert (np.abs(np.array(dequantize(stored) - array)) <= step * 1.01).all()
    assert stored.nbytes == 7 * 256 * bits // 8 + 2 * 4 * 7 * 256 // group_size


def test_what_mlx_has_no_form_for_is_refused() -> None:
    with pytest.raises(ModelError, match="7 bits given; 2, 3, 4, 5, 6, 8 are supported"):
        Form(64, 7)
    with pytest.raises(ModelError, match="a group size of 16 given; 32, 64, 128"):
        Form(16, 4)
    with pytest.raises(ModelError, match="groups of 64"):
        quantize(mx.zeros((2, 96)), Form(64, 4))
    form = Form(32, 4)
    sound = quantize(mx.zeros((2, 64)), form)
    assert sound.biases is not None
    for weight, biases in ((sound.weight[:, :-1], sound.biases), (sound.weight, sound.biases[:1])):
        with pytest.raises(ModelError, match="do not fit together"):
            QuantizedTensor(weight, sound.scales, biases, form)
    with pytest.raises(ModelError, match="not a matrix of uint32"):
        QuantizedTensor(sound.weight.astype(mx.int32), sound.scales, sound.biases, form)


def test_a_quantized_layer_is_the_dense_layer_of_its_matrix() -> None:
    stored = quantize(mx.random.normal((48, 64), key=mx.random.key(2)), Form(32, 4))
    bias, x = mx.random.normal((48,)), mx.random.normal((3, 5, 64))
    layer = QuantizedLinear("q", stored, bias)
    assert layer.shape == (64, 48)
    assert largest(layer(x) - Linear("d", layer.dense(), bias)(x)) < 1e-4
    table = QuantizedEmbedding(stored)
    ids = mx.array([[0, 47], [3, 3]])
    assert mx.array_equal(table(ids), dequantize(stored)[ids])
    assert largest(table.as_linear(x) - x @ dequantize(stored).T) < 1e-4


class Lora:
    """One adapter over every layer, as in training."""

    apart = True
    anchor: mx.array | None = None

    def __init__(self, pairs: dict[str, tuple[mx.array, mx.array]]):
        self.pairs = pairs

    def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        a, b = self.pairs[name]
        return y + (x @ a) @ b


@pytest.mark.parametrize("how", [{"bits": 4, "group_size": 32}, {"mode": "mxfp4"}], ids=str)
def test_lora_on_a_quantized_base_has_the_gradient_of_its_dense_twin(how: dict[str, Any], tmp_path: Path) -> None:
    """Through every quantized product to the adapters of the layers below."""
    folder = quantize_folder(CHECKPOINTS / "qwen2-untied", tmp_path / "q", **how).path
    quantized, dense = opened(folder, quantize="keep").llama, opened(folder, quantize="none").llama
    assert quantized.linear_shapes == dense.linear_shapes
    assert all(isinstance(linear, QuantizedLinear) for layer in quantized.layers for linear in layer.linears)
    mx.random.seed(3)
    pairs = {
        name: (mx.random.normal((inputs, 2)) * inputs**-0.5, mx.random.normal((2, outputs)) * 0.1)
        for name, (inputs, outputs) in quantized.linear_shapes.items()
    }
    grown = {}
    for label, model in (("quantized", quantized), ("dense", dense)):

        def loss(pairs: dict[str, tuple[mx.array, mx.array]], model: Llama = model) -> mx.array:
            out = model.logits(model(TOKENS, adapters=Lora(pairs)))
            return (mx.logsumexp(out, axis=-1) - out[..., 7]).mean()

        grown[label] = mx.value_and_grad(loss)(pairs)
        mx.eval(grown[label])
    assert abs(grown["quantized"][0].item() - grown["dense"][0].item()) < 1e-4
    for name in pairs:
        for got, wanted in zip(grown["quantized"][1][name], grown["dense"][1][name], strict=True):
            assert largest(got - wanted) < 1e-4, name
            assert largest(wanted) > 0


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "qwen3", "llama-llama3", "mistral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_written_folder_is_what_quantizing_on_load_gives(tmp_path: Path, name: str, bits: int) -> None:
    written = quantize_folder(CHECKPOINTS / name, tmp_path / "out", bits=bits, group_size=32)
    kept, dense = opened(written.path, quantize="keep"), opened(written.path, quantize="none")
    assert spread(kept.llama, dense.llama) < 1e-3
    on_load = opened(CHECKPOINTS / name, quantize=f"{bits}bit", group_size=32)
    assert on_load.parameters == kept.parameters == opened(CHECKPOINTS / name).parameters
    assert on_load.bytes == kept.bytes < dense.bytes
    assert spread(kept.llama, on_load.llama) == 0
    source = opened(CHECKPOINTS / name).llama
    for got, wanted in zip(kept.llama.layers, source.layers, strict=True):
        for quantized, linear in zip(got.linears, wanted.linears, strict=True):
            error = mx.linalg.norm(quantized.dense() - linear.weight) / mx.linalg.norm(linear.weight)
            assert largest(error) < (0.1 if bits == 4 else 0.01), linear.name
    assert written.bytes_after < written.bytes_before


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_a_folder_of_another_mode_of_mlx_is_held_as_it_is_or_dense(mode: str, tmp_path: Path) -> None:
    """Scales of one byte, no biases; the embedding too."""
    written = quantize_folder(CHECKPOINTS / "qwen2-tied", tmp_path / "q", mode=mode)
    group, bits = SMALL_FLOATS[mode]
    config = json.loads((written.path / "config.json").read_text())
    assert config["quantization"] == {"group_size": group, "bits": bits, "mode": mode}
    assert written.form == f"{bits} bits in groups of {group} ({mode})"
    kept, dense = (opened(written.path, quantize=how) for how in ("keep", "none"))
    assert isinstance(kept.llama.embed_tokens, QuantizedEmbedding)
    assert kept.llama.dtype == mx.float32
    assert kept.parameters == dense.parameters
    assert kept.bytes < dense.bytes / 2
    assert spread(kept.llama, dense.llama) < 1e-3
    assert spread(kept.llama, opened(CHECKPOINTS / "qwen2-tied").llama) > 1e-3, "its numbers are those of few bits"
    half = opened(written.path, quantize="keep", dtype="float16").llama
    assert half.dtype == half(TOKENS).dtype == mx.float16


def test_a_mixture_is_that_of_mlx_lm() -> None:
    """Its own function, taken out of the file: importing that needs transformers."""
    root = package.folder()
    assert root is not None
    tree = ast.parse((root / "convert.py").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    wanted = next(each for each in tree.body if getattr(each, "name", "") == "mixed_quant_predicate_builder")
    wanted.args.defaults, wanted.returns = [ast.Constant(64)], None  # type: ignore[attr-defined]
    for each in ast.walk(wanted):
        if isinstance(each, ast.FunctionDef):
            each.returns = None
            for argument in each.args.args:
                argument.annotation = None
    exec(compile(ast.fix_missing_locations(ast.Module([wanted], [])), "convert.py", "exec"), scope)  # noqa: S102
    parts = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
    for layers in (1, 2, 8, 24, 32, 61):
        names = [f"model.layers.{index}.{part}" for index in range(layers) for part in parts]
        model = SimpleNamespace(
            named_modules=lambda names=names: [(name, None) for name in names], layers=range(layers)
        )
        for mixture in RECIPES:
            theirs = scope["mixed_quant_predicate_builder"](mixture, model, 32)
            ours = Recipe.of(None, 32, mixture=mixture)
            for name in (*names, "model.embed_tokens", "lm_head"):
                assert theirs(name, None) == asdict(ours.form(name, layers)), (mixture, layers, name)


def test_a_mixed_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = quantize_folder(CHECKPOINTS / "qwen2-untied", tmp_path / "mixed", group_size=32, recipe="mixed_3_6")
    kept, dense = (opened(written.path, quantize=how) for how in ("keep", "none"))
    layers = kept.llama.layers
    found = [linear.quantized.bits for linear in layers[-1].linears if isinstance(linear, QuantizedLinear)]
    assert found == [3, 3, 6, 3, 3, 3, 6]
    assert isinstance(kept.llama.lm_head, QuantizedLinear)
    assert kept.llama.lm_head.quantized.bits == 6
    assert spread(kept.llama, dense.llama) < 1e-3
    section = json.loads((written.path / "config.json").read_text())["quantization"]
    named = {name for name in section if name not in ("group_size", "bits", "mode")}
    assert "lm_head" in named
    assert named <= {name.removesuffix(".scales") for name in safetensors.read_folder(written.path)}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"recipe": "mixed_1_9"}, "recipe 'mixed_1_9' given; mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6 are allowed"),
        ({"recipe": "mixed_4_6", "bits": 4}, "give neither bits nor a mode with it"),
        ({"recipe": "mixed_4_6", "mode": "nvfp4"}, "give neither bits nor a mode with it"),
        ({"group_size": 0}, "a group size of 0 given; 32, 64, 128 are supported"),
        ({"mode": "fp16"}, "mode 'fp16' given; affine, mxfp4, mxfp8, nvfp4 are supported"),
        ({"mode": "nvfp4", "bits": 8}, "nvfp4 of 8 bits in groups of 16 given; it has 4 bits in groups of 16"),
        ({"mode": "mxfp8", "group_size": 64}, "it has 8 bits in groups of 32"),
    ],
)
def test_a_form_that_there_is_not_is_refused_before_anything_is_written(
    asked: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        quantize_folder(CHECKPOINTS / "qwen2-tied", tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_decodes_with_a_cache(folder: Path) -> None:
    model = opened(folder, quantize="keep").llama
    kv, tokens = KeyValues(model, 1, 64), np.array(TOKENS).tolist()
    assert kv.keys[0].dtype == mx.float32
    cached.through(model, kv, [tokens[0][:-1]], [0])
    last = cached.through(model, kv, [tokens[0][-1:]], [7])
    assert np.abs(last[0, 0] - logits(model)[0, -1]).max() < 1e-4


def test_the_shards_stay_and_the_rest_is_copied(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    shards = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names == ["config.json", "generation_config.json", *shards, safetensors.INDEX_NAME, "tokenizer.json"]
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert config["rope_theta"] == 1e4, "where mlx-lm looks for it"
    placement = json.loads((folder / safetensors.INDEX_NAME).read_text())["weight_map"]
    assert set(placement) == set(safetensors.read_folder(folder))
    assert placement["lm_head.scales"] == placement["lm_head.weight"]
    assert [path.name for path in folder.parent.iterdir()] == ["q4"], "no draft is left"


def test_what_no_model_reads_and_what_is_hidden_is_left_behind(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CHECKPOINTS / "qwen2-tied", source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    weights = safetensors.read_folder(source)
    mx.eval(weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones((4,))
    safetensors.write(source / "model.safetensors", weights)
    for name in (".hidden.json", "weights.bin"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("kept")
    found = quantize_folder(source, tmp_path / "q4", group_size=32)
    stored = safetensors.read_folder(found.path)
    assert not [name for name in stored if "lm_head" in name or "inv_freq" in name]
    assert found.bytes_before == sum(array.nbytes for name, array in weights.items() if name in stored)
    assert found.bytes_after == sum(array.nbytes for array in stored.values())
    names = {path.name for path in found.path.iterdir()}
    assert names == {path.name for path in source.iterdir()} - {".hidden.json", "weights.bin"}
    assert (found.path / "additional_chat_templates" / "tool_use.jinja").read_text() == "T"
    assert opened(found.path).llama.args.tied


def test_layers_may_differ_from_the_rest(folder: Path) -> None:
    """mlx-lm's mixed recipes: some layers in more bits, some dense."""
    weights = safetensors.read_folder(CHECKPOINTS / "qwen2-untied")
    stored = safetensors.read_folder(folder)
    mx.eval(weights, stored)
    head, up = "lm_head", "model.layers.1.mlp.up_proj"
    eight = quantize(weights[f"{head}.weight"], Form(32, 8))
    stored |= mlx_layout.split(f"{head}.weight", eight)
    for part in ("scales", "biases"):
        del stored[f"{up}.{part}"]
    stored[f"{up}.weight"] = weights[f"{up}.weight"]
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    safetensors.write(folder / "model.safetensors", stored)
    quantization = {"group_size": 32, "bits": 4, head: {"group_size": 32, "bits": 8}, up: False}
    rewrite(folder / "config.json", quantization=quantization, quantization_config=quantization)
    model = opened(folder, quantize="keep").llama
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.quantized.bits == 8
    assert type(model.layers[1].mlp.up_proj) is Linear
    assert spread(model, opened(folder, quantize="none").llama) < 1e-3
    # 4 bits are asked for: what has more is rounded again, what has as few stays.
    fewer = opened(folder, quantize="4bit", group_size=64).llama
    assert isinstance(fewer.layers[0].mlp.down_proj, QuantizedLinear)
    assert fewer.layers[0].mlp.down_proj.quantized.form.group_size == 32
    assert isinstance(fewer.lm_head, QuantizedLinear)
    assert fewer.lm_head.quantized.bits == 8, "32 inputs are no whole group of 64"
    again = opened(folder, quantize="4bit", group_size=32).llama
    assert isinstance(again.lm_head, QuantizedLinear)
    assert again.lm_head.quantized.bits == 4


@pytest.mark.parametrize(
    ("section", "cause"),
    [({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "with biases are not of mode 'mxfp4'"),
     ({"group_size": 32, "bits": 4, "mode": "int4"}, "mode 'int4' given; affine, mxfp4, mxfp8, nvfp4 are"),
     ({"group_size": 32, "bits": 4, "mode": ["affine"]}, r"quantization: mode \['affine'\] given; affine"),
     ({"group_size": 32, "bits": 4, "mode": "nvfp4"}, "groups of 32 given; it has 4 bits in groups of 16"),
     ({"group_size": 32, "bits": 7}, "quantization: 7 bits"), ({"group_size": 32}, "bits null"),
     ({"group_size": 64, "bits": 4}, r"the quantized layer '.*' ?: 4 bits in groups of 64"),
     ({"group_size": 32, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}}, "'lm_head': 8 bits"),
     ({"group_size": 32, "bits": 4, "lm_head": {"bits": 8}}, "quantization: lm_head: group_size null"),
     ({"quant_method": "awq", "bits": 4}, "group_size null")],
)  # fmt: skip
def test_a_section_that_does_not_fit_is_named(folder: Path, section: dict[str, object], cause: str) -> None:
    rewrite(folder / "config.json", quantization=section, quantization_config=section)
    with pytest.raises(ModelError, match=cause):
        opened(folder)


def test_foreign_quantizations_and_damaged_layers_are_named(folder: Path) -> None:
    rewrite(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="'gptq'"):
        opened(folder)
    with pytest.raises(ModelError, match="quantized already"):
        quantize_folder(folder, folder.parent / "again")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has shape .*not \(64, 32\)"):
        opened(folder)
    quantize_again = {"group_size": 32, "bits": 4}
    rewrite(folder / "config.json", quantization=quantize_again, quantization_config=None)
    stored = safetensors.read_folder(folder)
    mx.eval(stored)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    del stored["model.layers.0.mlp.up_proj.biases"]
    safetensors.write(folder / "model.safetensors", stored)
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.up_proj' lacks"):
        opened(folder)


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "llama-linear", tmp_path, dirs_exist_ok=True)
    weights = safetensors.read_folder(tmp_path)
    mx.eval(weights)
    weights["model.layers.0.mlp.up_proj.weight"] = mx.zeros((64, 32), mx.int8)
    safetensors.write(tmp_path / "model.safetensors", weights)
    with pytest.raises(ModelError, match=r"up_proj\.weight' is of .*int8"):
        opened(tmp_path)
    with pytest.raises(ModelError, match=r"up_proj\.weight' is of .*int8"):
        quantize_folder(tmp_path, tmp_path / "out", 4, 32)


def test_options_that_do_not_exist_are_refused() -> None:
    source = CHECKPOINTS / "llama-linear"
    with pytest.raises(ModelError, match="dtype: 'float8' given; float32, float16, bfloat16 are allowed"):
        opened(source, dtype="float8")
    with pytest.raises(ModelError, match="quantize: '3bit' given; 4bit, 8bit, keep, none are allowed"):
        opened(source, quantize="3bit")
    with pytest.raises(ModelError, match="a group size of 48"):
        opened(source, quantize="4bit", group_size=48)


def test_embedding_models_stay_dense_when_decoders_are_quantized() -> None:
    dense, asked = (opened(CHECKPOINTS / "bert", quantize=quantize).encoder(TOKENS) for quantize in (None, "8bit"))
    assert mx.array_equal(dense, asked)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_the_one_asked_for(dtype: str) -> None:
    wanted = getattr(mx, dtype)
    model = opened(CHECKPOINTS / "qwen3", dtype=dtype).llama
    assert model.dtype == model(TOKENS).dtype == wanted
    assert KeyValues(model, 1, 64).keys[0].dtype == wanted
    quantized = opened(CHECKPOINTS / "qwen3", dtype=dtype, quantize="4bit", group_size=32).llama
    assert quantized.dtype == quantized(TOKENS).dtype == wanted
    hidden = opened(CHECKPOINTS / "mpnet", dtype=dtype).encoder(TOKENS)
    assert hidden.dtype == wanted


def test_a_quantized_model_is_there_whole_or_not_whenever_the_power_fails(tmp_path: Path) -> None:
    """With the files that are copied along with its weights."""
    (tmp_path / "disk").mkdir()
    with powercut.recorded(tmp_path / "disk") as disk:
        quantize_folder(CHECKPOINTS / "qwen2-untied", tmp_path / "disk/q4", bits=4, group_size=32)
    wanted = {f"q4/{path.name}": path.read_bytes() for path in (tmp_path / "disk/q4").iterdir()}
    assert "q4/tokenizer.json" in wanted
    for cut in disk.cuts():
        found = {name: content for name, content in cut.tree.items() if name.startswith("q4/")}
        assert found in ((wanted,) if cut.finished else ({}, wanted)), cut


def test_a_failed_quantization_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "save_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        quantize_folder(CHECKPOINTS / "qwen3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, folder: Path) -> None:
    for source, cause in (
        (CHECKPOINTS / "bert", "'bert' cannot be quantized; models that generate can"),
        (
            CHECKPOINTS.parent / "vectors" / "embeddinggemma",
            "'gemma3_text' cannot be quantized; models that generate can",
        ),
        (folder, "quantized already"),
        (folder / "config.json", "only such a model can be quantized"),
    ):
        with pytest.raises(ModelError, match=cause):
            quantize_folder(source, tmp_path / "out")
    with pytest.raises(ModelError, match="exists already"):
        quantize_folder(CHECKPOINTS / "qwen3", folder)
    with pytest.raises(ModelError, match="7 bits"):
        quantize_folder(CHECKPOINTS / "qwen3", tmp_path / "out", bits=7)
    assert not (tmp_path / "out").exists()


def test_the_blocks_of_a_gguf_stay_as_they_are(smollm2: LoadedModel) -> None:
    kept = load("kept", [str(smollm2.path)], quantize="keep")
    assert kept.parameters == smollm2.parameters
    assert kept.bytes < smollm2.bytes / 4
    tokens = mx.array([[1, 4093, 198, 2683, 359, 253, 5356]])
    wanted = smollm2.llama.logits(smollm2.llama(tokens))
    assert largest(kept.llama.logits(kept.llama(tokens)) - wanted) < 2e-3
