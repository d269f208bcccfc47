"""Checkpoints of AWQ, GPTQ and FP8: their numbers are those of each method's definition, or they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.prospect import prospect
from engine.checkpoints.verifying import verify
from engine.models.bridge import weights
from engine.platform.jsonfiles import read_config
from engine.weights import foreign, safetensors
from engine.weights.foreign_sections import Packing
from engine.weights.packed_integers import PackedIntegers
from engine.weights.quantized import QuantizedTensor, dequantize
from stoker.errors import ModelError
from tests.engine import bridged, foreign_files, tiny

CHECKPOINTS = Path(__file__).parents[1] / "goldens" / "architectures"
RANDOM = np.random.default_rng(17)


def read(packing: Packing, parts: dict[str, np.ndarray]) -> QuantizedTensor | mx.array:
    qzeros, g_idx = (None if name not in parts else mx.array(parts[name]) for name in ("qzeros", "g_idx"))
    return PackedIntegers(packing).read(
        mx.array(parts["qweight"]), mx.array(parts["scales"]), qzeros, g_idx, mx.float32
    )


@pytest.mark.parametrize("group", [32, 64, 256, -1])
@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8)])
def test_codes_become_mlx_s_and_stand_for_the_same_numbers(method: Any, bits: int, group: int) -> None:
    weight = RANDOM.standard_normal((64, 256)).astype(np.float32)
    codes = foreign_files.Codes(weight, bits, group)
    less_one = method == "gptq"
    found = read(Packing(method, bits, group, less_one), codes.gptq() if less_one else codes.awq())
    assert isinstance(found, QuantizedTensor)
    assert (found.bits, found.form.group_size) == (bits, {32: 32, 64: 64}.get(group, 128))
    assert np.abs(np.array(dequantize(found)) - codes.weight).max() < 1e-5
    assert np.abs(codes.weight - weight).max() < 8 / 2**bits, "and they are the weights"


def test_the_second_version_of_gptq_has_its_zeros_as_they_are() -> None:
    codes = foreign_files.Codes(RANDOM.standard_normal((32, 64)).astype(np.float32), 4, 32)
    found = read(Packing("gptq", 4, 32, less_one=False), codes.gptq(less=0))
    assert isinstance(found, QuantizedTensor)
    assert np.abs(np.array(dequantize(found)) - codes.weight).max() < 1e-5


@pytest.mark.parametrize("group", [32, 16])
def test_groups_that_mlx_has_not_become_dense(group: int) -> None:
    """Inputs of one group that lie apart, as GPTQ orders them by weight, and groups that are too small."""
    of = RANDOM.permutation(64).astype(np.int32) // group if group == 32 else None
    codes = foreign_files.Codes(RANDOM.standard_normal((32, 64)).astype(np.float32), 4, group, of)
    found = read(Packing("gptq", 4, group, less_one=True), codes.gptq())
    assert isinstance(found, mx.array)
    assert np.abs(np.array(found) - codes.weight).max() < 1e-6


def test_without_zeros_codes_are_symmetric() -> None:
    codes = foreign_files.Codes(RANDOM.standard_normal((32, 64)).astype(np.float32), 4, 32)
    parts = codes.awq()
    del parts["qzeros"]
    found = read(Packing("awq", 4, 32), parts)
    assert isinstance(found, QuantizedTensor)
    wanted = ((codes.codes.astype(np.float32) - 8) * codes.scales.astype(np.float32)[codes.g_idx]).T
    assert np.abs(np.array(dequantize(found)) - wanted).max() < 1e-5


def logits(model: LoadedModel) -> np.ndarray:
    return np.array(model.decoder.logits(model.decoder(mx.array([bridged.prompts()[0]])))[0])


def opened(path: Path, **options: Any) -> LoadedModel:
    return load("tiny", [str(path)], **options)


def made(name: str, folder: Path) -> Path:
    """A model of Stoker's own layers, or of mlx-lm's as on the hub, experts one by one."""
    if name == "llama":
        return CHECKPOINTS / "qwen2-untied"
    bridged.write_hub_folder(folder, name)
    return folder


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "awq"), ("llama", "gptq"), ("llama", "fp8"), ("phi3", "gptq"), ("phi3", "fp8"), ("qwen3_moe", "awq")],
)
def test_a_folder_is_read_held_in_its_bits_or_dense(name: str, method: str, tmp_path: Path) -> None:
    source = made(name, tmp_path / "source")
    folder = foreign_files.write(source, tmp_path / method, method)
    wanted = opened(folder / "dense")
    dense, kept = (opened(folder / "quantized", quantize=how) for how in ("none", "keep"))
    assert wanted.parameters == dense.parameters == kept.parameters
    bridged.assert_close(logits(dense), logits(wanted))
    bridged.assert_close(logits(kept), logits(wanted))
    assert (kept.bytes < 0.8 * wanted.bytes) == (method != "fp8"), "FP8 becomes dense"
    assert np.abs(logits(wanted) - logits(opened(source))).max() > 1e-3, "its numbers are those of few bits"


#: A Falcon-H1's numbers that its parts are multiplied by, none of them 1.
MULTIPLIERS: dict[str, Any] = {
    "attention_out_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.25, "lm_head_multiplier": 0.75,
    "mlp_multipliers": [1.5, 0.6], "ssm_in_multiplier": 1.25, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9],
    "ssm_out_multiplier": 0.8,
}  # fmt: skip


def test_codes_of_a_falcon_h1_stand_for_numbers_that_are_multiplied(tmp_path: Path) -> None:
    """In its maker's own folders, where mlx-lm's file multiplies the codes."""
    source, convolutions = tmp_path / "source", "conv1d.weight"
    # Codes of so many states fill whole words.
    bridged.write_folder(source, "falcon_h1", **MULTIPLIERS, mamba_d_state=6)
    network, _ = weights.network_of(read_config(source), "falcon_h1")
    arrays = dict(tree_flatten(network.parameters()))
    upright = {name: array.swapaxes(1, 2) if name.endswith(convolutions) else array for name, array in arrays.items()}
    mx.eval(upright)
    safetensors.write(source / "model.safetensors", upright, {"format": "pt"})
    folder = foreign_files.write(source, tmp_path / "gptq", "gptq")
    wanted = opened(folder / "dense")
    for how in ("none", "keep"):
        bridged.assert_close(logits(opened(folder / "quantized", quantize=how)), logits(wanted))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_rows_have_adapters_over_layers_of_few_bits(name: str, tmp_path: Path) -> None:
    folder = foreign_files.write(made(name, tmp_path / "source"), tmp_path / "awq", "awq")
    rows, found = mx.array(bridged.prompts()[:2]), list[np.ndarray]()
    for model in (opened(folder / "dense"), opened(folder / "quantized", quantize="keep")):
        pool = AdapterPool(model, AdapterStore(tmp_path / f"adapters{len(found)}"))
        pool.save("one", tiny.adapter(model, 2, 2, bridged.targets_of(model)), {})
        given = pool.rows([0, pool.acquire("one")])
        found.append(np.array(model.decoder.logits(model.decoder(rows, adapters=given))))
    bridged.assert_close(found[1], found[0])
    assert np.abs(found[0][0] - logits(opened(folder / "dense"))).max() < 1e-3, "the first row has none"
    assert np.abs(found[0][1] - np.array(plain(opened(folder / "dense"), rows))[1]).max() > 1e-2


def plain(model: LoadedModel, rows: mx.array) -> mx.array:
    return model.decoder.logits(model.decoder(rows))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_what_a_folder_is_shows_without_its_weights(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path / "source")
    for method, form in (("awq", "4 bit in groups of 32 (awq)"), ("fp8", "8 bit in blocks of 16 × 24 (fp8)")):
        folder = foreign_files.write(source, tmp_path / method, method)
        found = verify(folder / "quantized").inspection
        assert found.parameters == inspect(folder / "dense").parameters
        assert found.quantization == form
        bytes_ = {how: prospect("x", [str(folder / "quantized")], quantize=how).bytes for how in ("none", "keep")}
        assert (bytes_["keep"] < bytes_["none"]) == (method == "awq")


def section(**changed: Any) -> dict[str, Any]:
    return {**foreign_files.SECTIONS["gptq"][1], **changed}


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (section(bits=5), "bits = 5 are not supported; of gptq 2, 3, 4, 8 are"),
        (section(bits=None), "bits = null are not supported"),
        (section(quant_method="awq", bits=8), "bits = 8 are not supported; of awq 4 are"),
        (section(group_size=0), "group_size = 0: a whole number of at least 1 is needed, or -1"),
        (section(group_size="32"), 'group_size = "32": a whole number'),
        (section(checkpoint_format="marlin"), 'checkpoint_format = "marlin" is not supported; allowed: gptq, gptq_v2'),
        (section(quant_method="awq", version="gemv"), 'version = "gemv" is not supported; allowed: gemm'),
        (section(is_marlin_format=True), "is_marlin_format = true is not supported"),
        (section(dynamic={"+:layers.0": {"bits": 8}}), "dynamic = .* is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [16]}, r"weight_block_size = \[16\]: two whole numbers"),
        (
            {"quant_method": "fp8", "weight_block_size": [0, 16]},
            "weight_block_size = .*two whole numbers of at least 1",
        ),
    ],
)
def test_a_section_that_is_not_supported_is_refused_by_name(stated: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: quantization_config: {words}"):
        foreign.in_mlx_layout({"quantization_config": stated}, {}, mx.float32)


@pytest.mark.parametrize("method", ["compressed-tensors", ["awq"], None])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_method_that_is_not_read_is_refused_with_those_that_are(name: str, method: object, tmp_path: Path) -> None:
    described = {"quantization_config": {"quant_method": method, "format": "pack-quantized"}}
    folder = tmp_path / "model"
    if name == "llama":
        shutil.copytree(CHECKPOINTS / "qwen2-untied", folder)
    else:
        bridged.write_folder(folder, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **described}))
    for look in (opened, verify):
        with pytest.raises(ModelError, match=r"quantization_config .* is not supported: MLX's own, .*awq, gptq"):
            look(folder)


PART = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("awq", {"scales": None}, "lacks its scales"),
        ("awq", {"scales": mx.zeros((3, 32))}, r"codes \(32, 4\), scales \(3, 32\) and zeros \(1, 4\) do not fit"),
        ("awq", {"qzeros": mx.zeros((2, 4), mx.int32)}, r"zeros \(2, 4\) do not fit together"),
        (
            "gptq",
            {"qweight": mx.zeros((4, 32), mx.float32)},
            r"its codes are .*float32 \(4, 32\), not a matrix of int32",
        ),
        ("gptq", {"g_idx": mx.full((32,), 7, mx.int32)}, "does not name a group for each of 32 inputs"),
        ("gptq", {"g_idx": mx.zeros((5,), mx.int32)}, r"g_idx of shape \(5,\) does not name a group"),
        ("fp8", {"weight_scale_inv": None}, "lacks its scales"),
        ("fp8", {"weight_scale_inv": mx.zeros((2, 2), mx.uint8)}, "its scales are of mlx.core.uint8, not of floating"),
        ("fp8", {"weight": mx.zeros((32, 32))}, "has scales and no weight of F8_E4M3"),
        (
            "fp8",
            {"weight_scale_inv": mx.zeros((3, 3))},
            r"blocks of \(16, 24\): a weight \(32, 32\) and scales \(3, 3\)",
        ),
    ],
)
def test_a_layer_whose_parts_do_not_fit_is_named(
    method: str, change: dict[str, mx.array | None], words: str, tmp_path: Path
) -> None:
    folder = foreign_files.write(CHECKPOINTS / "qwen2-untied", tmp_path / method, method) / "quantized"
    arrays = dict(safetensors.read_folder(folder))
    for part, value in change.items():
        del arrays[f"{PART}.{part}"]
        if value is not None:
            arrays[f"{PART}.{part}"] = value
    described = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=words) as caught:
        foreign.in_mlx_layout(described, arrays, mx.float32)
    assert PART in str(caught.value)


def test_one_scale_for_a_whole_matrix_and_scales_of_activations_are_read() -> None:
    """As FP8 of whole tensors has them; products here do not round activations."""
    weight = mx.random.normal((4, 8))
    stored = {"a.weight": mx.to_fp8(weight), "a.weight_scale_inv": mx.array(0.5), "a.activation_scale": mx.array(2.0)}
    found, config = foreign.in_mlx_layout({"quantization_config": {"quant_method": "fp8"}}, stored, mx.float32)
    assert list(found) == ["a.weight"]
    assert tiny.largest(found["a.weight"] - 0.5 * weight) < 0.2
    assert not config


def test_integers_are_not_taken_for_weights_of_mlx_lm_s_networks(tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "phi3")
    arrays = dict(safetensors.read_folder(tmp_path / "model"))
    mx.eval(arrays)
    arrays["model.layers.1.mlp.down_proj.weight"] = mx.zeros((32, 48), mx.int8)
    safetensors.write(tmp_path / "model" / "model.safetensors", arrays)
    for look in (opened, verify):
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight' is of .*int8, not of floating-point"):
            look(tmp_path / "model")
