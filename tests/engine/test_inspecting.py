"""What a model is, from its headers: as loading finds it, without MLX and without a weight."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.merging import Merged
from engine.checkpoints.inspecting import KINDS, Inspection, inspect
from engine.checkpoints.loading import DECODERS, LoadedModel, load
from engine.checkpoints.quantizing import Quantized, quantize_folder
from engine.checkpoints.verifying import verify
from engine.models.bridge import weights
from engine.models.embedders import ENCODERS
from engine.models.kv_sizes import bytes_per_token
from engine.weights import safetensors
from stoker.cli import engine_tool
from stoker.errors import ModelError
from tests.engine import bridged, gguf_files


def load_it(path: Path) -> object:
    return load("model", [str(path)])


def quantize_it(path: Path) -> object:
    return quantize_folder(path, path.with_name("copy"), bits=4, group_size=32)


ARCHITECTURES = Path(__file__).parents[1] / "goldens" / "architectures"
CHECKPOINTS = sorted(path.parent for path in ARCHITECTURES.glob("*/config.json"))


def test_every_architecture_that_loads_is_known() -> None:
    assert {**dict.fromkeys(DECODERS, "generate"), **dict.fromkeys(ENCODERS, "embed")} == KINDS


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_it_agrees_with_loading(folder: Path) -> None:
    found, loaded = inspect(folder), load("tiny", [str(folder)])
    assert (found.architecture, found.kind, found.context) == (loaded.architecture, loaded.kind, loaded.context)
    assert found.supported
    assert found.weight_bytes["32 bit"] == 4 * found.parameters
    # What the file has in addition to the model: positions, poolers, a second copy of a tied head.
    assert loaded.parameters <= found.parameters <= 1.3 * loaded.parameters
    assert (found.cache_bytes_per_1000 is None) == (found.kind == "embed")
    assert json.loads(json.dumps(found.to_json()))["path"] == str(folder)


@pytest.mark.parametrize(
    ("name", "fields", "longest"),
    [
        ("phi3", {"sliding_window": 40}, 40),
        ("phi3", {"sliding_window": 40, "use_sliding_window": False}, 256),
        ("smollm3", {"sliding_window": 40}, 256),
        ("gpt_oss", {"sliding_window": 40, "max_position_embeddings": 256}, 256),
        ("llama4_text", {"floor_scale": 64}, 63),
        ("kimi_vl", {"sliding_window": 40}, 40),
    ],
    ids=str,
)
def test_a_context_that_is_bounded_by_what_a_model_file_passes_over_is_shown_so(
    name: str, fields: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", name, **fields)
    assert inspect(tmp_path / "model").context == longest
    assert load("model", [str(tmp_path / "model")]).context == longest


@pytest.mark.parametrize("name", ["phi3", "phi", "starcoder2", "smollm3", "mamba", "mamba2"])
def test_a_context_that_no_file_states_is_shown_as_it_is_served(name: str, tmp_path: Path) -> None:
    """transformers leaves out of a config.json what is its own default."""
    bridged.write_folder(tmp_path / "model", name)
    file = tmp_path / "model" / "config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stated.items() if key not in LENGTHS}))
    assert inspect(file.parent).context == load("model", [str(file.parent)]).context


#: The names under which a config.json says how long a text may be.
LENGTHS = {"max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"}


@pytest.mark.parametrize("name", ["max_sequence_length", "max_target_positions", "block_size"])
def test_a_context_of_a_rare_name_is_shown(name: str, tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "starcoder2", **{"max_position_embeddings": None, name: 77})
    assert inspect(tmp_path / "model").context == load("model", [str(tmp_path / "model")]).context == 77


@pytest.mark.parametrize("work", [load_it, verify, quantize_it], ids=["load", "verify", "quantize"])
@pytest.mark.parametrize("name", ["phi3", "starcoder2", "mamba"])
def test_more_layers_than_there_are_tensors_are_refused_before_any_is_made(
    work: Callable[[Path], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is wrong would make layers for hours, in all memory."""
    folder, made = tmp_path / "model", list[object]()
    bridged.write_folder(folder, name)
    stated = json.loads((folder / "config.json").read_text())
    names = [key for key in ("num_hidden_layers", "n_layer") if key in stated]
    (folder / "config.json").write_text(json.dumps(stated | dict.fromkeys(names, 1 << 30)))
    monkeypatch.setattr(weights, "network_of", lambda *asked: made.append(asked))
    with pytest.raises(ModelError, match=rf"config\.json: {names[0]} is {1 << 30}, and the model has \d+ tensors"):
        work(folder)
    assert not made


@pytest.mark.parametrize("work", [load_it, verify], ids=["load", "verify"])
def test_more_blocks_of_a_gguf_file_than_it_has_tensors_are_refused_before_any_is_made(
    work: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made = tmp_path / "model.gguf", list[object]()
    gguf_files.write(file, "qwen3_moe")
    monkeypatch.setattr(weights, "network_of", lambda *asked: made.append(asked))
    # Behind the key stands its type.
    content, key = bytearray(file.read_bytes()), b"qwen3moe.block_count"
    struct.pack_into("<I", content, content.index(key) + len(key) + 4, 1 << 30)
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf: qwen3moe\.block_count is \d+, and the model has \d+ tensors"):
        work(file)
    assert not made


def test_real_models_are_described(smollm2: LoadedModel, minilm: LoadedModel) -> None:
    found = inspect(smollm2.path)
    assert (found.format, found.quantization, found.parameters) == ("gguf", "Q4_1", smollm2.parameters)
    assert found.dtypes == {"Q4_1": 106_168_320, "Q8_0": 28_311_552, "F32": 35_136}
    assert (found.context, found.layers, found.dim, found.vocabulary) == (8192, 30, 576, 49152)
    assert found.chat_template
    token = bytes_per_token(smollm2.decoder)
    assert found.cache_bytes_per_1000 == {"16 bit": 500 * token, "32 bit": 1000 * token}
    found = inspect(minilm.path)
    assert (found.format, found.quantization, found.context) == ("safetensors", None, 256)
    assert found.weight_bytes["32 bit"] == 90_852_864


def test_a_quantized_folder_counts_its_weights_not_its_codes(tmp_path: Path) -> None:
    source = ARCHITECTURES / "qwen2-untied"
    folder = quantize_folder(source, tmp_path / "q4", bits=4, group_size=32).path
    found = inspect(folder)
    assert found.parameters == inspect(source).parameters
    assert found.quantization == "4 bit in groups of 32 (MLX)"
    assert set(found.dtypes) == {"4 bit", "F32"}
    assert found.weight_bytes["stored"] < found.weight_bytes["16 bit"]
    assert verify(folder).tensors == found.tensors


def test_what_is_not_supported_is_still_described(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(ARCHITECTURES / "mistral", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma9"}))
    found = inspect(folder)
    assert (found.kind, found.supported) == ("unknown", False)
    assert '"gemma9" is not supported' in found.notes[0]
    with pytest.raises(ModelError, match='"gemma9" is not supported'):
        verify(folder)


def test_verify_names_what_does_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ARCHITECTURES / "llama-llama3", folder)
    config = json.loads((folder / "config.json").read_text())
    for change, cause in (
        ({"num_hidden_layers": 3}, "'model.layers.2.*' of shape .* is missing"),
        ({"intermediate_size": 8}, r"has shape .*, not \(8, "),
        ({"vocab_size": 3}, "has shape"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=cause):
            verify(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = safetensors.read_folder(folder)
    safetensors.write(folder / "model.safetensors", {**weights, "extra": weights["model.norm.weight"]})
    with pytest.raises(ModelError, match="1 tensors that this architecture does not have: extra"):
        verify(folder)
    (folder / "tokenizer.json").unlink()
    safetensors.write(folder / "model.safetensors", weights)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        verify(folder)


def test_neither_a_folder_nor_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model\.onnx: a model is a folder"):
        inspect(tmp_path / "model.onnx")


def test_mlx_is_not_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from engine.checkpoints.inspecting import inspect; "
        "inspect(Path(sys.argv[1])); "
        "assert not {'mlx', 'mlx.core', 'celery', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(CHECKPOINTS[0])], check=True)


@pytest.mark.parametrize(
    ("made", "read"),
    [(Inspection, engine_tool.Inspected), (Quantized, engine_tool.QuantizedReply), (Merged, engine_tool.Exported)],
)
def test_what_the_command_line_reads_is_what_the_engine_found(made: Any, read: Any) -> None:
    assert {field.name for field in dataclasses.fields(made)} == set(read.__annotations__)
