"""GGUF: the parser agrees with the gguf package's writer, and survives every damaged file."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.weights.gguf import GGUF
from engine.weights.gguf_names import llama_name, unpermute
from stoker.errors import ModelError

RANDOM = np.random.default_rng(5)
WEIGHT = RANDOM.standard_normal((4, 256)).astype(np.float32)
TYPES = [GGMLQuantizationType[name] for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]


def written(path: Path) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_string("general.name", "tiny — ü")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_tensor("plain", WEIGHT)
    for kind in TYPES:
        writer.add_tensor(kind.name, quantize(WEIGHT, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_metadata_and_tensors_are_read(sound: Path) -> None:
    gguf = GGUF(sound)
    assert gguf.metadata["general.name"] == "tiny — ü"
    assert gguf.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ab"]
    assert list(gguf.metadata["tokenizer.ggml.token_type"]) == [1, 1, 3]
    assert gguf.tensors["plain"].shape == (4, 256)
    assert np.array_equal(gguf.dequantize("plain"), WEIGHT)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_each_type_is_dequantized_as_gguf_does(sound: Path, kind: GGMLQuantizationType) -> None:
    got = GGUF(sound).dequantize(kind.name)
    assert got.dtype == np.float32
    assert np.array_equal(got, dequantize(quantize(WEIGHT, kind), kind).reshape(4, 256))


def test_an_absent_tensor_is_named(sound: Path) -> None:
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        GGUF(sound).dequantize("nothing")


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"", "empty"), (b"GGML" + bytes(40), "not a GGUF file"), (b"GGUF" + b"\x01\0\0\0" + bytes(40), "version 1"),
     (b"GGUF\x03\0\0\0" + b"\xff" * 16, "announced"), (b"GGUF\x03\0\0\0", "are left")],
)  # fmt: skip
def test_a_bad_preamble_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf") as caught:
        GGUF(path)
    assert cause in str(caught.value)


def test_every_shorter_file_is_refused(sound: Path, tmp_path: Path) -> None:
    content, path = sound.read_bytes(), tmp_path / "short.gguf"
    for length in (*range(1, 700, 7), len(content) // 2, len(content) - 1000):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError):
            GGUF(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_header_is_read_or_refused(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 800))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    with suppress(ModelError):
        gguf = GGUF(path)
        for name in gguf.tensors:
            gguf.dequantize(name)


@pytest.mark.parametrize("name", ["plain", *(kind.name for kind in TYPES)])
def test_a_tensor_in_pieces_is_the_whole(sound: Path, name: str) -> None:
    gguf = GGUF(sound)
    pieces = list(gguf.pieces(name, 96))
    assert max(map(len, pieces)) == 96
    assert np.array_equal(np.concatenate(pieces), gguf.dequantize(name).reshape(-1))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def made(offsets: list[int], size: int, alignment: int = 1) -> bytes:
    """A file of tensors of two float32 at `offsets`, with `size` bytes of data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(offsets), 1)
    header += text("general.alignment") + struct.pack("<II", 4, alignment)
    for number, offset in enumerate(offsets):
        header += text(f"t{number}") + struct.pack("<IQIQ", 1, 2, GGMLQuantizationType.F32, offset)
    return header + bytes(-len(header) % alignment) + bytes(size)


@pytest.mark.parametrize(
    ("content", "cause"),
    [(made([0, 8], 16), ""), (made([8, 0], 16), ""), (made([0, 7], 16), "'t0' and 't1' overlap"),
     (made([8, 1], 16), "'t1' and 't0' overlap"), (made([0, 8], 15), "'t1' ends at byte"),
     (made([0, 64], 72, 64), ""), (made([0, 8], 16, 48), "48, not a power of two"),
     (made([0, 8], 16, 1 << 21), "not a power of two"), (made([0, 8], 72, 64), "not aligned to 64")],
)  # fmt: skip
def test_tensors_lie_within_the_file_and_do_not_overlap(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "made.gguf"
    path.write_bytes(content)
    if not cause:
        assert GGUF(path).dequantize("t1").tolist() == [0.0, 0.0]
        return
    with pytest.raises(ModelError, match=cause):
        GGUF(path)


def described(*values: bytes, tensors: tuple[str, ...] = ()) -> bytes:
    """A file of these metadata values, and of tensors of one float32 with these names."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values)
    for number, name in enumerate(tensors):
        header += text(name) + struct.pack("<IQIQ", 1, 1, GGMLQuantizationType.F32, 32 * number)
    return header + bytes(-len(header) % 32) + bytes(32 * len(tensors))


def nested(depth: int) -> bytes:
    """The value "k": a number in so many arrays."""
    return text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQI", 4, 1, 7)


@pytest.mark.parametrize(
    ("content", "cause"),
    [(described(*[text("k") + struct.pack("<II", 4, n) for n in (1, 2)]), "the metadata key 'k' occurs twice"),
     (described(nested(5)), "metadata arrays nest deeper than 4"),
     (described(text("k") + struct.pack("<I", 99)), "metadata type 99 is unknown"),
     (described(text("k") + struct.pack("<IIQ", 9, 4, 70_000) + bytes(280_000)), "has 70000 numbers; 65536 are"),
     (described(tensors=("t", "t")), "tensor 't' occurs twice"),
     (described(tensors=("",)), "a name of 0 characters")],
)  # fmt: skip
def test_what_a_header_says_twice_or_too_deep_or_at_too_great_length_is_refused(
    tmp_path: Path, content: bytes, cause: str
) -> None:
    path = tmp_path / "made.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"made\.gguf: .*{cause}"):
        GGUF(path)


def test_what_a_header_says_once_and_within_its_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    path.write_bytes(described(nested(4), text("tokenizer.x") + struct.pack("<II", 4, 2), tensors=("t", "u")))
    found = GGUF(path)
    assert found.metadata == {"k": [[[[7]]]], "tokenizer.x": 2}
    assert list(found.tensors) == ["t", "u"]


def test_names_follow_hugging_face() -> None:
    assert llama_name("token_embd.weight") == "model.embed_tokens.weight"
    assert llama_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    assert llama_name("blk.0.ffn_up.weight") == "model.layers.0.mlp.up_proj.weight"
    assert llama_name("rope_freqs.weight") is None


def test_unpermute_undoes_the_order_of_the_converter() -> None:
    heads, weight = 3, RANDOM.standard_normal((24, 5)).astype(np.float32)
    stored = weight.reshape(heads, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    assert np.array_equal(unpermute(stored, heads), weight)
