"""Whole models with something wrong in them: each loads, or ends in one `ModelError` that names what and where."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import load
from engine.checkpoints.verifying import verify
from engine.platform.jsonfiles import read_object
from stoker.errors import ModelError

ARCHITECTURES = Path(__file__).parents[1] / "goldens" / "architectures"
CHECKPOINTS = sorted(path.parent for path in ARCHITECTURES.glob("*/model.safetensors"))
ABSURD: list[Any] = [
    None, -1, 0, 1, 3, 7, 2**31, 2**31 - 1, 2**70, 0.5, 1e308, "x", "", [], {}, [1] * 5, {"a": 1}, True, False,
]  # fmt: skip
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
#: Bytes that a checkpoint of some 100 KB may take, even if it announces more.
MOST_MEMORY = 64 << 20


def survives(path: Path) -> None:
    """Loading, inspecting and verifying each come to an end, with a result or with one clear error."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for attempt in (inspect, verify, lambda path: load("damaged", [str(path)])):
        try:
            attempt(path)
        except ModelError as error:
            message = str(error)
            assert str(path) in message
            assert len(message) < 2000
    assert mx.get_peak_memory() - before < MOST_MEMORY


def copied(checkpoint: Path, folder: Path) -> Path:
    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint, target)
    return target


def change_config(data: st.DataObject, folder: Path) -> None:
    path = copied(data.draw(st.sampled_from(CHECKPOINTS)), folder) / "config.json"
    config = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(config)))
        config[key] = data.draw(st.sampled_from(ABSURD))
        if data.draw(st.booleans()):
            del config[key]
    path.write_text(json.dumps(config))
    survives(path.parent)


def change_weights(data: st.DataObject, folder: Path) -> None:
    path = copied(data.draw(st.sampled_from(CHECKPOINTS)), folder) / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = sorted(header.keys() - {"__metadata__"})
    name, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    start, end = header[name]["data_offsets"]
    by = data.draw(st.sampled_from([-(2**40), -64, -1, 1, 64, 2**40, 2**62]))
    changes: list[Callable[[], object]] = [
        lambda: header[name].update(data_offsets=header[other]["data_offsets"]),
        lambda: header[name].update(data_offsets=[start + by, end + by]),
        lambda: header[name].update(data_offsets=[start, end + by]),
        lambda: header[name].update(
            shape=[*header[name]["shape"], data.draw(st.sampled_from([0, 1, 2, 2**31, 2**62]))]
        ),
        lambda: header[name].update(shape=header[name]["shape"][::-1]),
        lambda: header[name].update(dtype=data.draw(st.sampled_from(["F16", "BF16", "U32", "I8", "F64", "F8_E4M3"]))),
        lambda: header.pop(name),
        lambda: header.update({name + "x": header.pop(name)}),
    ]
    data.draw(st.sampled_from(changes))()
    text = json.dumps(header).encode()
    announced = len(text) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 2**20, 2**63 - len(text) - 1]))
    rest = content[8 + length :]
    path.write_bytes(
        struct.pack("<Q", announced) + text + rest[: data.draw(st.sampled_from([len(rest), len(rest) // 2]))]
    )
    survives(path.parent)


def change_tokenizer(data: st.DataObject, folder: Path) -> None:
    target = copied(
        data.draw(st.sampled_from([path for path in CHECKPOINTS if (path / "tokenizer.json").is_file()])), folder
    )
    path = target / "tokenizer.json"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'{}[]",:0179ax\x00\xff'))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    survives(target)


def tiny_gguf(path: Path) -> Path:
    """A Llama of one layer: 32 wide, 2 heads, Q8_0, a byte-level vocabulary."""
    random = np.random.default_rng(3)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa", "<s>", "</s>"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
              "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
    weights = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (len(tokens), 32), **weights}.items():
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(random.standard_normal(shape).astype(np.float32), kind), raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


NUMBERS = [0, 1, 2, 3, 31, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


def change_gguf(data: st.DataObject, folder: Path, sound: Path) -> None:
    """Numbers of the header anywhere: counts, lengths, types, dimensions, offsets."""
    content = bytearray(sound.read_bytes())
    places = [4, 8, 16, *range(24, 420), *range(content.find(b"token_embd") - 900, content.find(b"ffn_norm") + 300)]
    for _ in range(data.draw(st.integers(1, 3))):
        at, width = data.draw(st.sampled_from(places)), data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.sampled_from(NUMBERS)) % 256**width
        content[at : at + width] = value.to_bytes(width, "little")
    path = folder / "damaged.gguf"
    path.write_bytes(
        content[: data.draw(st.sampled_from([len(content), len(content), len(content) - 1, len(content) // 2]))]
    )
    survives(path)


@QUICK
@given(st.data())
def test_a_config_that_does_not_match_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    change_config(data, tmp_path)


@QUICK
@given(st.data())
def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    change_weights(data, tmp_path)


@QUICK
@given(st.data())
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    change_tokenizer(data, tmp_path)


@QUICK
@given(st.data())
def test_a_damaged_gguf_model_is_refused(tmp_path: Path, gguf: Path, data: st.DataObject) -> None:
    change_gguf(data, tmp_path, gguf)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(st.data())
def test_damage_of_every_kind_for_long(tmp_path: Path, gguf: Path, data: st.DataObject) -> None:
    kinds: list[Callable[[st.DataObject, Path], None]] = [
        change_config, change_weights, change_tokenizer, lambda data, folder: change_gguf(data, folder, gguf),
    ]  # fmt: skip
    data.draw(st.sampled_from(kinds))(data, tmp_path)


def test_the_sound_models_are_sound(tmp_path: Path) -> None:
    for path in (*CHECKPOINTS, tiny_gguf(tmp_path / "tiny.gguf")):
        if path.suffix == ".gguf" or (path / "tokenizer.json").is_file():
            assert load("sound", [str(path)]).parameters > 0
            assert verify(path).numbers > 0


def test_how_far_a_verification_is_is_said_before_each_tensor(tmp_path: Path, gguf: Path) -> None:
    for path in (CHECKPOINTS[0], gguf):
        said: list[tuple[int, int]] = []
        tensors = verify(path, lambda done, total: said.append((done, total))).tensors  # noqa: B023
        assert said == [(done, tensors) for done in range(tensors)]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    target = copied(CHECKPOINTS[0], tmp_path)
    (target / "model.safetensors").rename(target / name)
    for attempt in (inspect, verify, lambda path: load("pickled", [str(path)])):
        with pytest.raises(ModelError, match=r"refused\. Convert them once.*save_pretrained"):
            attempt(target)
    with pytest.raises(ModelError, match=r"a folder with config\.json and safetensors, or a \.gguf file"):
        load("pickled", [str(target / name)])


def test_a_number_that_is_none_is_found(tmp_path: Path, gguf: Path) -> None:
    target = copied(CHECKPOINTS[0], tmp_path)
    content = bytearray((target / "model.safetensors").read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    (target / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor '.*' holds values that are infinite"):
        verify(target)
    damaged = bytearray(gguf.read_bytes())
    damaged[-4:] = struct.pack("<f", float("inf"))
    (tmp_path / "inf.gguf").write_bytes(damaged)
    with pytest.raises(ModelError, match=r"inf\.gguf: tensor '.*' holds values"):
        verify(tmp_path / "inf.gguf")


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"]
)
@pytest.mark.parametrize("levels", [101, 900])
def test_json_that_is_nested_too_deeply_is_refused_by_its_files_name(tmp_path: Path, file: str, levels: int) -> None:
    path = tmp_path / file
    # Each name that some reader looks into, at once.
    names = ("eos_token_id", "rope_scaling", "added_tokens_decoder", "target_modules", "chat_template", "quantization")
    path.write_text("{" + ", ".join(f'"{name}": {"[" * levels}{"]" * levels}' for name in names) + "}")
    with pytest.raises(ModelError, match=rf"{file}: objects and lists in one another, more than 100 deep"):
        read_object(path)
    path.write_text('{"a": ' + "[" * 90 + "]" * 90 + "}")
    assert read_object(path)["a"]


def test_a_header_of_safetensors_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    target = copied(CHECKPOINTS[0], tmp_path)
    header = b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    survives(target)
    with pytest.raises(ModelError, match=r"model\.safetensors: objects and lists in one another"):
        load("deep", [str(target)])


def test_a_long_value_in_a_file_is_cut_in_the_error_that_names_it(tmp_path: Path) -> None:
    target = copied(CHECKPOINTS[-1], tmp_path)
    config = json.loads((target / "config.json").read_text())
    for name in config:
        (target / "config.json").write_text(json.dumps(config | {name: ["x" * 5000]}))
        survives(target)


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\udfff": 1}', '{"a": [{"b": "x\\udc80y"}]}'])
def test_half_a_surrogate_pair_in_a_file_is_refused_by_its_files_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"config\.json: a text in it holds half a surrogate pair"):
        read_object(path)
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_object(path) == {"a": "😀"}
