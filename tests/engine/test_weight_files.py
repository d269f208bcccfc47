"""Which files a model is read from, parts and left-overs among them, and ids that no row of a table has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import load
from engine.checkpoints.sources import resolve
from engine.checkpoints.verifying import verify
from engine.weights import safetensors
from engine.weights.digest import weights_digest
from engine.weights.gguf import GGUF
from stoker.errors import ModelError
from tests.engine import tiny
from tests.engine.gguf_files import finish
from tests.engine.test_architectures_gguf import write_gguf
from tests.engine.test_configs import CHECKPOINTS, copied, outputs

#: What is done to a part's fields, by its number.
Change = Callable[[int, dict[str, Any]], object]


def refused(path: Path, cause: str) -> None:
    for check in (inspect, verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(path)


def test_an_index_next_to_a_whole_file_is_left_over(tmp_path: Path) -> None:
    folder = copied("llama-llama3", tmp_path)
    (folder / safetensors.INDEX_NAME).write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )
    (folder / "consolidated.safetensors").write_bytes(b"another model's")
    assert np.array_equal(outputs(folder, "llama-llama3"), outputs(CHECKPOINTS / "llama-llama3", "llama-llama3"))
    verify(folder)
    assert inspect(folder).format == "safetensors"


def test_a_shard_that_no_index_names_is_no_part_of_the_model(tmp_path: Path) -> None:
    folder = copied("qwen2-untied", tmp_path)
    safetensors.write(folder / "model-00009-of-00009.safetensors", {"model.norm.weight": mx.zeros(32)})
    assert np.array_equal(outputs(folder, "qwen2-untied"), outputs(CHECKPOINTS / "qwen2-untied", "qwen2-untied"))
    verify(folder)


def test_a_shard_that_is_missing_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = copied("qwen2-untied", tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(folder, rf"{shard.name}, which it names: No such file in the folder \(1 of 3 are missing\). Download")


def test_a_folder_of_one_file_of_weights_needs_neither_its_usual_name_nor_an_index(tmp_path: Path) -> None:
    folder = copied("llama-llama3", tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert np.array_equal(outputs(folder, "llama-llama3"), outputs(CHECKPOINTS / "llama-llama3", "llama-llama3"))
    shutil.copyfile(folder / "weights.safetensors", folder / "others.safetensors")
    refused(folder, "2 safetensors files and no model.safetensors.index.json, so which to read is unclear")


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = copied("llama-llama3", tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, "no safetensors file in it")
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (folder / name).write_bytes(b"pickled")
        refused(folder, "only pickled weights .* refused")
        (folder / name).unlink()


def test_a_tensor_in_two_shards_is_refused_by_every_reader(tmp_path: Path) -> None:
    folder = copied("qwen2-untied", tmp_path)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    arrays = safetensors.read(second)
    mx.eval(arrays)
    safetensors.write(second, {**arrays, next(iter(safetensors.read(first))): mx.zeros(4)})
    refused(folder, rf"{second.name}: tensor '.*' is in another shard too, {first.name}")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A Llama as three GGUF files."""
    whole = write_gguf("llama-linear", tmp_path / "whole.gguf")
    return split(whole, 3)


def split(whole: Path, count: int, change: Change = lambda part, fields: None) -> list[Path]:
    """As llama.cpp's gguf-split writes them: all metadata in the first."""
    model, files = gguf.GGUFReader(whole), []
    for part in range(count):
        path = whole.with_name(f"part-{part + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        if part == 0:
            copy_metadata(model, writer)
        fields = {"split.no": part, "split.count": count, "split.tensors.count": len(model.tensors)}
        change(part, fields)
        for key, value in fields.items():
            (writer.add_int32 if key == "split.tensors.count" else writer.add_uint16)(key, value)
        for tensor in model.tensors[part::count]:
            writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
        finish(writer)
        files.append(path)
    return files


def copy_metadata(model: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for key, field in model.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)


def test_all_parts_of_a_split_gguf_are_read(parts: list[Path], tmp_path: Path) -> None:
    assert np.array_equal(outputs(parts[0], "llama-linear"), outputs(tmp_path / "whole.gguf", "llama-linear"))
    whole, found = inspect(tmp_path / "whole.gguf"), inspect(parts[0])
    assert (found.tensors, found.parameters) == (whole.tensors, whole.parameters)
    assert found.format == "gguf, 3 files"
    assert found.file_bytes == sum(part.stat().st_size for part in parts)
    assert verify(parts[0]).numbers == verify(tmp_path / "whole.gguf").numbers
    for name in GGUF(tmp_path / "whole.gguf").tensors:
        assert np.array_equal(GGUF(parts[0]).dequantize(name), GGUF(tmp_path / "whole.gguf").dequantize(name))


def test_another_part_a_missing_one_and_another_name_are_refused_by_name(parts: list[Path], tmp_path: Path) -> None:
    refused(parts[1], r"part 2 of 3; name the first, part-00001-of-00003\.gguf")
    renamed = tmp_path / "model.gguf"
    shutil.copyfile(parts[0], renamed)
    refused(renamed, r"the first of 3 parts, .*: call it model-00001-of-00003\.gguf")
    kept = parts[2].read_bytes()
    shutil.copyfile(parts[1], parts[2])
    refused(parts[0], r"part-00003-of-00003\.gguf: it says that it is part 1 \(from 0\) of 3, not 2 of 3")
    parts[2].write_bytes(kept[:-100])
    refused(parts[0], r"part-00003-of-00003\.gguf: tensor .* ends at byte")
    parts[2].unlink()
    refused(parts[0], r"part part-00003-of-00003\.gguf is not there \(1 of 3")


def test_parts_that_do_not_make_what_was_announced_are_refused(tmp_path: Path) -> None:
    whole = write_gguf("llama-linear", tmp_path / "whole.gguf")
    first = split(whole, 2, lambda part, fields: fields.update({"split.tensors.count": 99}))[0]
    refused(first, "99 tensors are announced, its 2 parts hold")
    first = split(whole, 2, lambda part, fields: fields.update({"split.count": 1}) if part == 0 else None)[0]
    both(first, "is missing")


@pytest.mark.parametrize(
    ("fields", "cause"),
    [({"split.no": 1, "split.count": 1}, "split.no is 1, and split.count 1; the file is damaged"),
     ({"split.count": 60_000 * 2}, "split.count is 120000, not a number from 0 to 99999")],
)  # fmt: skip
def test_a_part_that_cannot_be_is_refused(tmp_path: Path, fields: dict[str, int], cause: str) -> None:
    path = tmp_path / "it.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        writer.add_uint32(key, value)
    writer.add_tensor("x", np.zeros(32, np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=cause):
        GGUF(path)


def test_a_tensor_that_two_parts_hold_is_refused_by_the_names_of_both(parts: list[Path]) -> None:
    """Which of them is the model's, nobody knows."""
    second = gguf.GGUFReader(parts[1])
    writer = gguf.GGUFWriter(parts[1], "llama")
    for key, value in (("split.no", 1), ("split.count", 3)):
        writer.add_uint16(key, value)
    for tensor in (*second.tensors, gguf.GGUFReader(parts[0]).tensors[0]):
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    finish(writer)
    both(parts[0], rf"{parts[1].name}: tensor '.*' is in {parts[0].name} too")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    """Hugging Face's next to GGUF's own: one of them would be passed over."""
    path = write_gguf("llama-linear", tmp_path / "whole.gguf")
    model = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "twice.gguf", "llama")
    copy_metadata(model, writer)
    for tensor in model.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.add_tensor("model.norm.weight", np.zeros(32, np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=r"tensor 'model\.norm\.weight' is in the file under two names"):
        load("it", [str(tmp_path / "twice.gguf")])


def test_the_digest_is_that_of_all_parts(parts: list[Path]) -> None:
    before = weights_digest(parts[0])
    content = bytearray(parts[2].read_bytes())
    content[-1] ^= 1
    parts[2].write_bytes(content)
    assert weights_digest(parts[0]) != before


def test_every_part_of_a_split_gguf_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo: str, file: str, **_: object) -> str:
        asked.append(file)
        return f"/c/{file}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve(["hf:org/model:q4/m-00001-of-00002.gguf"]) == Path("/c/q4/m-00001-of-00002.gguf")
    assert asked == ["q4/m-00001-of-00002.gguf", "q4/m-00002-of-00002.gguf"]
    assert resolve(["hf:org/model:m-00002-of-00002.gguf"]) == Path("/c/m-00002-of-00002.gguf")
    assert asked[2:] == ["m-00002-of-00002.gguf"]


def with_tokenizer(folder: Path, ids: dict[str, int]) -> Path:
    words = tokenizers.models.WordLevel(ids, unk_token=next(iter(ids)))
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    return folder


def both(folder: Path, cause: str) -> None:
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(folder)


@pytest.mark.parametrize("name", ["llama-llama3", "bert"])
def test_the_largest_id_needs_a_row_however_many_ids_there_are(tmp_path: Path, name: str) -> None:
    folder = with_tokenizer(copied(name, tmp_path), {"a": 0, "b": 63})
    assert load("it", [str(folder)]).tokenizer.vocab_size == 64
    both(with_tokenizer(folder, {"a": 0, "b": 64}), "the tokenizer has 65 tokens, the model only 64 rows")


def test_ids_that_stand_around_every_text_need_a_row_too(tmp_path: Path) -> None:
    folder = copied("bert", tmp_path)
    inner = tiny.tokenizer(10).inner
    inner.post_processor = processors.TemplateProcessing(single="<x> $A", special_tokens=[("<x>", 64)])
    inner.save(str(folder / "tokenizer.json"))
    both(folder, "the largest id is 64")


def test_a_token_type_that_is_not_computed_is_refused(tmp_path: Path) -> None:
    folder = copied("bert", tmp_path)
    inner = tiny.tokenizer(10).inner
    inner.post_processor = processors.TemplateProcessing(single="t0:0 $A:1", special_tokens=[("t0", 0)])
    inner.save(str(folder / "tokenizer.json"))
    both(folder, "token type 1; only 0 is supported")
