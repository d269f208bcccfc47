"""Safetensors: what is sound is read, every defect is one error that names the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from engine.weights import safetensors
from stoker.errors import ModelError

SOUND = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, dtype=np.float16)}, {"note": "x"})


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    arrays = {"x": mx.arange(6.0).reshape(2, 3), "y": mx.ones((2,), mx.bfloat16), "z": mx.array([1, 2])}
    safetensors.write(tmp_path / "a.safetensors", arrays, {"note": "x"})
    again = safetensors.read(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        assert mx.array_equal(again[name], array)
        assert again[name].dtype == array.dtype
    assert safetensors.read_metadata(tmp_path / "a.safetensors") == {"format": "mlx", "note": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"], "no temporary file is left"


def test_the_numbers_of_a_small_file_are_those_that_mlx_reads(tmp_path: Path) -> None:
    values = mx.array([[1.0, -2.5, 3e-5], [0.1, 6e4, 0.0]])
    arrays = {str(dtype): values.astype(dtype) for dtype in (mx.float32, mx.float16, mx.bfloat16)}
    safetensors.write(tmp_path / "a.safetensors", arrays, {"note": "x"})
    found = safetensors.read_numbers(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], np.array(array.astype(mx.float32))), name
    safetensors.write(tmp_path / "a.safetensors", {"x": mx.array([1])})
    with pytest.raises(ModelError, match="'x' has dtype I32; expected F32, F16, BF16"):
        safetensors.read_numbers(tmp_path / "a.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(SOUND)

    def fail(file: IO[bytes], *_: object) -> None:
        file.write(b"half")
        raise OSError(28, "disk full")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        safetensors.write(path, {"x": mx.zeros(1)})
    assert path.read_bytes() == SOUND
    assert len(list(tmp_path.iterdir())) == 1


DEFECTS = {
    "empty": (b"", "too few"),
    "header beyond the file": (struct.pack("<Q", 10**6) + b"{}", "exceeds"),
    "header a byte beyond the file": (struct.pack("<Q", 3) + b"{}", "exceeds"),
    "header and its length beyond the file": (struct.pack("<Q", 10) + b"{}", "exceeds"),
    "enormous header": (struct.pack("<Q", 2**63) + b"{}", "exceeds"),
    "not JSON": (with_header(b"{{", b""), "not valid JSON"),
    "deep JSON": (with_header(b"[" * 100_000, b""), "not valid JSON"),
    "a list": (with_header([], b""), "not an object"),
    "twice": (with_header(b'{"a":1,"a":1}', b""), "twice"),
    "incomplete": (with_header({"a": {"dtype": "F32"}}, b""), "incomplete"),
    "dtype": (with_header({"a": entry("F99")}, bytes(8)), "dtype 'F99'"),
    "dtype list": (with_header({"a": entry([])}, bytes(8)), "dtype"),
    "negative": (with_header({"a": entry(shape=[-2])}, bytes(8)), "invalid shape"),
    "true": (with_header({"a": entry(shape=[True, 2])}, bytes(8)), "invalid shape"),
    "huge": (with_header({"a": entry(shape=[2**40])}, bytes(8)), "invalid shape"),
    "bytes": (with_header({"a": entry(shape=[3])}, bytes(8)), "needs 12"),
    "offsets": (with_header({"a": entry(offsets=[8, 0])}, bytes(8)), "spans -8"),
    "overlap": (with_header({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlap or hole"),
    "hole": (with_header({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "overlap or hole"),
    "hole before all": (with_header({"a": entry(offsets=[4, 12])}, bytes(12)), "overlap or hole"),
    "cut off": (with_header({"a": entry()}, bytes(4)), "cut off"),
    "metadata": (with_header({"__metadata__": {"a": 1}}, b""), "__metadata__"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_is_named(tmp_path: Path, name: str) -> None:
    content, cause = DEFECTS[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.safetensors") as caught:
        safetensors.read(path)
    assert cause in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        arrays = safetensors.read(path)
    except ModelError:
        return
    mx.eval(list(arrays.values()))


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "m-1.safetensors", {"a": mx.ones(2)})
    safetensors.write(tmp_path / "m-2.safetensors", {"b": mx.zeros(3)})
    index = tmp_path / safetensors.INDEX_NAME
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    assert sorted(safetensors.read_folder(tmp_path)) == ["a", "b"]
    for placement, cause in (
        ({"a": "../m-1.safetensors"}, "no safetensors file of that folder"),
        ({"a": "m-1.safetensors", "c": "m-2.safetensors"}, "'c'"),
        ({"a": "m-3.safetensors"}, "No such file"),
        ([], "not an object"),
    ):
        index.write_text(json.dumps({"weight_map": placement}))
        with pytest.raises(ModelError, match=cause):
            safetensors.read_folder(tmp_path)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="save_pretrained"):
        safetensors.read_folder(tmp_path)
