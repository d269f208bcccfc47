"""Quantized copies of models that run mlx-lm's model files: what mlx-lm itself makes of them is the oracle."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints import networks
from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import load
from engine.checkpoints.quantizing import quantize_folder
from engine.models.bridge import package, weights
from engine.weights import safetensors
from engine.weights.precision import Precision
from stoker.errors import ModelError
from tests.engine import bridged
from tests.engine.architectures import config
from tests.engine.test_generate_lane import Driver, request

#: Wide enough for groups of 64, in which routers stay.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "block_dim": 64, "block_ff_dim": 64}


def of_mlx_lm(file: str, name: str) -> Callable[..., Any]:
    """A function of a file of mlx-lm's that cannot be imported here: it brings all of mlx-lm with it."""
    root = package.folder()
    assert root is not None
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    wanted = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    wanted.decorator_list, wanted.returns = [], None
    for argument in (*wanted.args.args, *wanted.args.kwonlyargs):
        argument.annotation = None
    for node in ast.walk(wanted):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
    scope: dict[str, Any] = {"nn": nn, "copy": copy, "compute_bits_per_weight": lambda _: 0.0}
    scope |= {"print": lambda *_: None, "_takes_global_scale": lambda _: False}
    exec(compile(ast.fix_missing_locations(ast.Module([wanted], [])), file, "exec"), scope)  # noqa: S102
    found: Callable[..., Any] = scope[name]
    return found


def converted(
    name: str, described: dict[str, Any], folder: Path, recipe: str | None, **form: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """(the network, its section of config.json) as `mlx_lm.convert` makes them of a folder."""
    network, _ = weights.network_of(described, name)
    weights.fill(folder, described, network, safetensors.read_folder(folder))
    network.eval()
    how: dict[str, Any] = {"group_size": None, "bits": None, **form}
    if recipe is not None:
        builder = of_mlx_lm("convert.py", "mixed_quant_predicate_builder")
        how["quant_predicate"] = builder(recipe, network, how["group_size"])
    network, found = of_mlx_lm("utils.py", "quantize_model")(network, {}, **how)
    return network, found["quantization"]


def forms(section: dict[str, Any], layers: set[str]) -> dict[str, Any]:
    """Of each layer, whether a section names it or not."""
    usual = {key: value for key, value in section.items() if not isinstance(value, dict)}
    return {layer: {"mode": "affine", "group_size": 64, **section.get(layer, usual)} for layer in layers}


CASES: list[Any] = [
    ("phi3", {"group_size": 32}),
    ("phi3", {"bits": 8}),
    pytest.param("phi3", {"mode": "mxfp4"}, marks=pytest.mark.slow),
    ("gemma3_text", {"mode": "nvfp4"}),
    pytest.param("gemma3", {"group_size": 32, "bits": 6}, marks=pytest.mark.slow),
    ("qwen3_moe", {"group_size": 32, "bits": 3}),
    pytest.param("qwen3_moe", {"mode": "mxfp8"}, marks=pytest.mark.slow),
    ("qwen3_moe", {"group_size": 32, "recipe": "mixed_3_6"}),
    ("deepseek_v3", {"group_size": 32, "recipe": "mixed_2_6"}),
    pytest.param("lfm2", {}, marks=pytest.mark.slow),
    # Its file names the bits of some layers and not their groups.
    ("rwkv7", {"group_size": 32}),
]


@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_a_copy_is_what_mlx_lm_makes_of_the_model(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    described = {**config(name), **WIDE, **({"rope_scaling": None} if name == "phi3" else {})}
    if "text_config" in described:
        described["text_config"] = {**described["text_config"], **WIDE}
    write(tmp_path / "model", name, described)
    form = {key: value for key, value in how.items() if key != "recipe"}
    wanted, section = converted(name, described, tmp_path / "model", how.get("recipe"), **form)
    done = quantize_folder(tmp_path / "model", tmp_path / "copy", **how)

    arrays = safetensors.read_folder(tmp_path / "copy")
    theirs = dict(tree_flatten(wanted.parameters()))
    assert arrays.keys() == theirs.keys()
    assert all(array.dtype == theirs[path].dtype and mx.array_equal(array, theirs[path])
               for path, array in arrays.items())  # fmt: skip
    layers = {path.removesuffix(".scales") for path in arrays if path.endswith(".scales")}
    assert layers
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert forms(written["quantization"], layers) == forms(section, layers)
    assert {key for key, value in written["quantization"].items() if isinstance(value, dict)} <= layers
    assert (done.quantized, done.dense) == (len(layers), len(arrays) - sum(
        path.endswith((".scales", ".biases")) or path.removesuffix(".weight") in layers for path in arrays
    ))  # fmt: skip
    assert done.bytes_after == sum(array.nbytes for array in arrays.values()) < done.bytes_before
    assert inspect(tmp_path / "copy").supported

    model = load("copy", [str(tmp_path / "copy")], quantize="keep")
    row = bridged.prompts()[0]
    logits = np.array(model.decoder.logits(model.decoder(mx.array([row])))[0])
    assert np.abs(logits - bridged.reference(wanted, row)).max() < 1e-3
    assert tokens(load("copy", [str(tmp_path / "copy")], quantize="keep"), row[:9], tmp_path) == greedy(wanted, row[:9])


def write(folder: Path, name: str, described: dict[str, Any]) -> None:
    """A folder with random weights as its network begins, and a tokenizer."""
    bridged.write_folder(folder, name)
    network, _ = weights.network_of(described, name)
    mx.random.seed(7)
    arrays = {
        path: array if array.ndim < 2 else mx.random.normal(array.shape) * array.shape[-1] ** -0.5
        for path, array in tree_flatten(network.parameters())
    }
    safetensors.write(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(described))


def tokens(model: Any, prompt: list[int], folder: Path) -> list[int]:
    driver = Driver(model, AdapterPool(model, AdapterStore(folder / "adapters")))
    sent = driver.send(request(prompt, max_tokens=8, ignore_eos=True))
    driver.run()
    return list(sent.ids)


def greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """mlx-lm's own, over its own cache."""
    caches, found, given = package.load("cache").make_prompt_cache(model), list[int](), prompt
    for _ in range(8):
        found.append(int(mx.argmax(model(mx.array([given]), cache=caches)[0, -1])))
        given = found[-1:]
    return found


def test_a_form_without_its_groups_is_that_of_64_when_a_model_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "model", "rwkv7", {**config("rwkv7"), **WIDE})
    network, _ = weights.network_of({**config("rwkv7"), **WIDE}, "rwkv7")
    weights.read(tmp_path / "model", {**config("rwkv7"), **WIDE}, network, Precision.of(quantize="4bit", group_size=32))
    assert (network.model.embeddings.bits, network.model.embeddings.group_size) == (8, 64)
    assert network.lm_head.group_size == 32


def test_experts_one_by_one_become_those_of_mlx_lm(tmp_path: Path) -> None:
    bridged.write_hub_folder(tmp_path / "model", "qwen3_moe")
    done = quantize_folder(tmp_path / "model", tmp_path / "copy", bits=8, group_size=32)
    names = safetensors.read_folder(done.path)
    assert "model.layers.0.mlp.switch_mlp.gate_proj.scales" in names
    assert not [name for name in names if ".experts." in name]


def test_the_part_that_sees_is_left_out_of_a_copy(tmp_path: Path) -> None:
    bridged.write_hub_folder(tmp_path / "model", "gemma3")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**described, "vision_config": {}, "_name_or_path": ""}))
    done = quantize_folder(tmp_path / "model", tmp_path / "copy", group_size=32)
    assert all(name.startswith("language_model.") for name in safetensors.read_folder(done.path))
    assert not {"vision_config", "_name_or_path"} & json.loads((done.path / "config.json").read_text()).keys()


def test_what_transformers_5_says_of_rope_is_said_as_mlx_lm_reads_it(tmp_path: Path) -> None:
    described = {key: value for key, value in config("gemma3_text").items() if "rope" not in key}
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    ropes["sliding_attention"] = {"rope_type": "default", "rope_theta": 5e3}
    write(tmp_path / "model", "gemma3_text", {**described, "rope_parameters": ropes})
    done = quantize_folder(tmp_path / "model", tmp_path / "copy", group_size=32)
    found = json.loads((done.path / "config.json").read_text())
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 5e3)
    assert found["rope_scaling"]["factor"] == 8.0
    load("copy", [str(done.path)], quantize="keep")


def test_a_large_copy_has_several_files_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridged.write_folder(tmp_path / "model", "phi3")
    monkeypatch.setattr(networks, "SHARD_BYTES", 10_000)
    done = quantize_folder(tmp_path / "model", tmp_path / "copy", group_size=32)
    files = safetensors.files(done.path)
    assert len(files) > 2
    assert all(sum(array.nbytes for array in safetensors.read(file).values()) <= 10_000 for file in files)
    placement = json.loads((done.path / safetensors.INDEX_NAME).read_text())
    assert placement["weight_map"].keys() == safetensors.read_folder(done.path).keys()
    assert placement["metadata"]["total_size"] == done.bytes_after
    load("copy", [str(done.path)], quantize="keep")


@pytest.mark.parametrize(
    ("name", "fields", "how", "words"),
    [
        ("gpt2", {}, {"recipe": "mixed_3_6", "group_size": 32}, "a recipe needs layers called down_proj"),
        ("phi3", {"quantization": {"bits": 4, "group_size": 32}}, {}, "quantized already"),
        ("phi3", {"model_type": "olmo"}, {}, 'architecture "olmo" is not supported: its file needs the package'),
        ("phi3", {"model_type": "phi33"}, {}, 'architecture "phi33" is not supported; the nearest names are phi3'),
        ("phi3", {"hidden_act": "relu"}, {}, 'hidden_act = "relu" is not supported'),
        ("phi3", {"num_hidden_layers": 5}, {}, "Missing 6 parameters: model.layers.4"),
    ],
)
def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(
    name: str, fields: dict[str, Any], how: dict[str, Any], words: str, tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", name, **fields)
    with pytest.raises(ModelError, match=words):
        quantize_folder(tmp_path / "model", tmp_path / "copy", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
