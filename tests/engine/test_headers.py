"""What is read of a model before it runs: counts, forms and sizes by its headers, and what is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters import merging
from engine.adapters.store import AdapterStore
from engine.checkpoints import quantizing
from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import load
from engine.checkpoints.prospect import prospect
from engine.checkpoints.recipes import Recipe
from engine.checkpoints.stored_forms import stored_forms
from engine.checkpoints.verifying import verify
from engine.weights import precision, safetensors
from engine.weights.digest import weights_digest
from engine.weights.foreign import in_mlx_layout
from engine.weights.foreign_sections import Packing
from engine.weights.packed_integers import PackedIntegers
from engine.weights.precision import Precision
from engine.weights.quantized import Form, QuantizedTensor, quantize
from engine.weights.safetensors_header import check_header, entries
from engine.weights.tensors import Tensors
from stoker.errors import ModelError
from tests.engine import foreign_files, tiny

BASES = Path(__file__).parents[1] / "goldens" / "architectures"


def copied(tmp_path: Path, name: str, **fields: Any) -> Path:
    """A golden folder with other fields in its config.json; None takes one out."""
    folder = tmp_path / "model"
    shutil.copytree(BASES / name, folder)
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


# Counts and forms


def header(dtype: str, *shape: int) -> dict[str, Any]:
    items = {"U32": 4, "F16": 2, "F32": 4}
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, items[dtype] * int(np.prod(shape))]}


def test_codes_count_as_the_weights_that_they_stand_for_each_layer_by_its_own_bits() -> None:
    layers = {"a": 4, "b": 8}
    held = {"norm.weight": header("F32", 64)}
    for layer, bits in layers.items():
        held |= {
            f"{layer}.weight": header("U32", 32, 64 * bits // 32),
            f"{layer}.scales": header("F16", 32, 2),
            f"{layer}.biases": header("F16", 32, 2),
        }
    section = {"bits": 4, "group_size": 32, "b": {"bits": 8, "group_size": 32}}
    forms, size = stored_forms(held, section, None)
    assert forms == {"F32": 64, "4 bit": 32 * 64, "8 bit": 32 * 64}
    assert size == sum(entry["data_offsets"][1] for entry in held.values())


@pytest.mark.parametrize("bits", [None, 0, 9, "4", 4.0])
def test_codes_of_no_known_width_are_refused(bits: Any) -> None:
    """They could not be counted."""
    codes = {"dtype": "U32", "shape": [32, 8], "data_offsets": [0, 1024]}
    held = {"a.weight": codes, "a.scales": {"dtype": "F16", "shape": [32, 2], "data_offsets": [1024, 1152]}}
    for section in ({"bits": bits}, {"bits": 4, "a": {"bits": bits}}):
        with pytest.raises(ModelError, match=f"bits {json.dumps(bits)} of a is not a number from 1 to 8"):
            stored_forms(held, section, None)


def test_a_qwen3_that_does_not_say_so_has_heads_of_128(tmp_path: Path) -> None:
    config = json.loads((BASES / "qwen3" / "config.json").read_text())
    found = inspect(copied(tmp_path, "qwen3", head_dim=None)).cache_bytes_per_1000
    assert found == {
        bits: 1000 * size * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * 128
        for bits, size in (("16 bit", 2), ("32 bit", 4))
    }


@pytest.mark.parametrize(("window", "noted"), [(31, True), (32, False), (33, False), (None, False)])
def test_a_window_is_noted_where_it_is_shorter_than_the_context(
    tmp_path: Path, window: int | None, noted: bool
) -> None:
    folder = copied(tmp_path, "mistral", max_position_embeddings=32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
    assert inspect(folder).notes == ((f"a sliding window of {window} tokens",) if noted else ())


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_quantized_model_will_take_is_what_its_matrices_then_take(bits: int) -> None:
    found = prospect("m", [str(BASES / "qwen3")], quantize=f"{bits}bit", dtype="float16")
    matrix = quantize(mx.zeros((64, 128), mx.float16), Form(64, bits))
    assert found.bytes == found.card.parameters * matrix.nbytes // matrix.size


def test_a_model_whose_text_would_change_behind_what_was_streamed_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "qwen3")
    switches = ("", "_for_bpe_even_though_it_will_corrupt_output")
    config = {f"clean_up_tokenization_spaces{name}": True for name in switches}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="clean_up_tokenization_spaces = true is not supported"):
        load("m", [str(folder)])


def test_thirds_of_a_mixture_begin_behind_the_first_eighth() -> None:
    """As in mlx-lm: of 24 layers the first 3, of those behind them each third, and the last 3."""
    recipe = Recipe.of(None, None, mixture="mixed_3_6")
    finer = [index for index in range(24) if recipe.form(f"layers.{index}.self_attn.v_proj", 24).bits == 6]
    assert finer == [0, 1, 2, *range(5, 21, 3), 21, 22, 23]


# Folders that are written


@pytest.mark.parametrize("by", ["quantizing", "merging"])
def test_a_folder_that_came_meanwhile_is_left_as_it_is_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    source, target = BASES / "qwen2-untied", tmp_path / "out"
    module: Any = {"quantizing": quantizing, "merging": merging}[by]
    publish = module.publish

    def late(draft: Path, home: Path) -> bool:
        home.mkdir()
        (home / "another's").touch()
        return bool(publish(draft, home))

    monkeypatch.setattr(module, "publish", late)
    AdapterStore(tmp_path / "adapters").write("m", "style", tiny.adapter(load("m", [str(source)]), 2, 1), {})
    write: dict[str, Callable[[], object]] = {
        "quantizing": lambda: quantizing.quantize_folder(source, target, bits=4, group_size=32),
        "merging": lambda: merging.merge([str(source)], tmp_path / "adapters/m/style/1", target),
    }
    with pytest.raises(ModelError, match="another program has put files there meanwhile"):
        write[by]()
    assert [path.name for path in target.iterdir()] == ["another's"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "out"]


def test_a_merged_copy_has_the_bases_other_files_and_no_index_that_is_left_over(tmp_path: Path) -> None:
    base = copied(tmp_path, "llama-llama3")
    assert [path.name for path in safetensors.files(base)] == ["model.safetensors"]
    (base / safetensors.INDEX_NAME).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    (base / "README.md").write_text("words")
    AdapterStore(tmp_path / "adapters").write("m", "style", tiny.adapter(load("m", [str(base)]), 2, 1), {})
    merging.merge([str(base)], tmp_path / "adapters/m/style/1", tmp_path / "merged")
    names = {path.name for path in base.iterdir()} - {safetensors.INDEX_NAME}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names


def test_an_index_of_shards_names_the_tensors_of_all(tmp_path: Path) -> None:
    folder = copied(tmp_path, "qwen2-untied")
    whole = safetensors.read_folder(folder)
    for path in safetensors.files(folder):
        path.unlink()
    names = sorted(whole)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        safetensors.write(folder / file, {name: whole[name] for name in part})
    placed = {name: file for file, part in halves.items() for name in part}
    (folder / safetensors.INDEX_NAME).write_text(json.dumps({"weight_map": placed}))
    made = quantizing.quantize_folder(folder, tmp_path / "q4", bits=4, group_size=32).path
    assert set(json.loads((made / safetensors.INDEX_NAME).read_text())["weight_map"]) == set(entries(made))
    assert verify(made).tensors == len(entries(made))
    # One that names a tensor of no shard is damaged.
    (folder / safetensors.INDEX_NAME).write_text(json.dumps({"weight_map": {**placed, "more": "a.safetensors"}}))
    with pytest.raises(ModelError, match=r"tensor 'more' \(1 in all\) is in no shard"):
        entries(folder)


@pytest.mark.parametrize(("code", "sound"), [(0x7E, True), (0xFE, True), (0x7F, False), (0xFF, False)])
def test_of_the_numbers_of_8_bits_two_are_none(tmp_path: Path, code: int, sound: bool) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BASES / "llama-llama3", folder)
    path = next(iter(safetensors.files(folder)))
    arrays = safetensors.read(path)
    name = next(name for name in arrays if name.endswith("down_proj.weight"))
    raw: np.ndarray = np.full(arrays[name].shape, 0x38, np.uint8)
    raw[-1, -1] = code
    layer = name.removesuffix(".weight")
    extra: dict[str, np.ndarray] = {name: raw, f"{layer}.weight_scale_inv": np.ones(1, np.float32)}
    dense: dict[str, np.ndarray] = {key: np.array(value) for key, value in arrays.items()}
    write_with_fp8(path, dense | extra)
    config = json.loads((folder / "config.json").read_text())
    section = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps({**config, **section}))
    if sound:
        assert verify(folder).tensors == len(arrays) + 1
    else:
        with pytest.raises(ModelError, match=rf"tensor '{name}' holds values that are infinite or no numbers"):
            verify(folder)


def write_with_fp8(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file by the format's own rules: MLX writes no numbers of 8 bits."""
    fields, data = {}, b""
    for name, array in arrays.items():
        kind = "F8_E4M3" if array.dtype == np.uint8 else "F32"
        fields[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# Weights


def test_the_metadata_says_who_wrote_a_file_also_where_there_is_more_to_say(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for more, wanted in ((None, {"format": "mlx"}), ({}, {"format": "mlx"}), ({"a": "b"}, {"format": "mlx", "a": "b"}),
                         ({"format": "pt"}, {"format": "pt"})):  # fmt: skip
        safetensors.write(path, {"x": mx.zeros(1)}, more)
        assert safetensors.read_metadata(path) == wanted
        assert check_header(path)["__metadata__"] == wanted


def test_integers_where_numbers_should_be_are_codes_of_an_unknown_kind() -> None:
    for kind in (mx.int32, mx.uint8, mx.bool_):
        tensors = Tensors({"x": partial(mx.ones, (2, 2), kind)}, {"x": (2, 2)}, "here", mx.float32)
        with pytest.raises(ModelError, match=r"'x' is of .*, not of floating-point numbers"):
            tensors.take("x", (2, 2))


@pytest.mark.parametrize("what", ["the same", "another number", "another dtype", "another shape", "codes"])
def test_a_copy_is_one_to_the_bit_and_only_then_let_go_of(what: str) -> None:
    first = mx.arange(64, dtype=mx.float32).reshape(2, 32)
    copies: dict[str, Any] = {
        "the same": first + 0,
        "another number": first + mx.array([[0.0], [1e-3]]),
        "another dtype": first.astype(mx.float16),
        "another shape": first.reshape(32, 2),
        "codes": quantize(first, Form(32, 8)),
    }
    copy = copies[what]
    shapes = {"head": tuple(copy.shape), "table": (2, 32)}
    tensors = Tensors({"head": lambda: copy, "table": lambda: first}, shapes, "here", mx.float32)
    assert tensors.drop_copy("head", "table") is (what == "the same")
    assert ("head" in tensors) is (what != "the same")
    assert np.array_equal(np.array(tensors.take("table", (2, 32))), np.array(first))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_zero_of_gptq_begins_again_at_nothing(bits: int) -> None:
    """Zeros are stored less by one, within their bits: one of all ones stands for 0."""
    codes = foreign_files.Codes(np.random.default_rng(3).standard_normal((32, 64)).astype(np.float32), bits, 32)
    parts = codes.gptq()
    ones = np.full_like(parts["qzeros"], -1)
    read = PackedIntegers(Packing("gptq", bits, 32, less_one=True)).read(
        mx.array(parts["qweight"]), mx.array(parts["scales"]), mx.array(ones), None, mx.float32
    )
    assert isinstance(read, QuantizedTensor)
    assert read.biases is not None
    assert not np.array(read.biases).any()


def test_inputs_that_do_not_fill_their_last_group_are_dense() -> None:
    """48 inputs in groups of 32: the last group has 16, which MLX has no form for."""
    random = np.random.default_rng(5)
    numbers, zeros = random.integers(0, 16, (48, 8)), random.integers(0, 15, (2, 8))
    shifts = 4 * np.arange(8)
    qweight = (numbers.reshape(6, 8, 8) << shifts[None, :, None]).sum(axis=1).astype(np.uint32)
    qzeros = (zeros.reshape(2, 1, 8) << shifts).sum(axis=-1).astype(np.uint32)
    scales = random.uniform(0.5, 1.5, (2, 8)).astype(np.float32)
    found = PackedIntegers(Packing("gptq", 4, 32)).read(
        mx.array(qweight), mx.array(scales), mx.array(qzeros), None, mx.float32
    )
    of = np.arange(48) // 32
    assert isinstance(found, mx.array)
    np.testing.assert_allclose(np.array(found), ((numbers - zeros[of]) * scales[of]).T, rtol=1e-6)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_what_was_read_of_a_foreign_section_is_not_said_again(where: str) -> None:
    section = {"quantization_config": {"quant_method": "fp8"}, "hidden_size": 8}
    config = section if where == "outside" else {"text_config": section, "model_type": "x"}
    arrays = {"a.weight": mx.zeros((2, 2), mx.uint8), "a.weight_scale_inv": mx.ones(1)}
    found, rest = in_mlx_layout(config, arrays, mx.float32)
    assert set(found) == {"a.weight"}
    assert rest == (
        {"hidden_size": 8} if where == "outside" else {"text_config": {"hidden_size": 8}, "model_type": "x"}
    )


def test_a_file_is_computed_in_the_type_of_most_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "on_cpu", lambda: False)
    large, small = mx.zeros((50, 50), mx.bfloat16), [mx.zeros(2, mx.float16) for _ in range(9)]
    assert Precision.of().dtype_for([*small, large]) == mx.bfloat16
    assert Precision.of().dtype_for([mx.zeros(3, mx.float32)]) == mx.bfloat16
    assert Precision.of("float16").dtype_for([large]) == mx.float16


def test_the_digest_is_of_a_files_size_too(tmp_path: Path) -> None:
    """Of a large file the ends alone are read: two that differ between them by their length are two models."""
    found = set()
    for number, size in enumerate((3 << 20, (3 << 20) + 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"\0" * size)
        found.add(weights_digest(folder))
    assert len(found) == 2
