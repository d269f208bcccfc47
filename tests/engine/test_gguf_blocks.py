"""GGUF blocks: every type gives what the gguf package gives, and what MLX is given holds the same numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from engine.weights import gguf_blocks
from engine.weights.gguf import GGUF
from stoker.errors import ModelError

RANDOM = np.random.default_rng(11)
WEIGHT = (RANDOM.standard_normal((6, 256)) * 3).astype(np.float32)
#: Types that the gguf package can make; of the others it reads what we make up.
MADE = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")]


def random_blocks(kind: GGMLQuantizationType, elements: int) -> np.ndarray:
    """Any bytes at all: infinite and absent numbers among the scales too."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return RANDOM.integers(0, 256, elements // block * block_bytes, dtype=np.uint8)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
def test_blocks_of_the_gguf_package_are_read_as_it_reads_them(kind: GGMLQuantizationType) -> None:
    made = quantize(WEIGHT, kind)
    got = gguf_blocks.dequantize(np.ascontiguousarray(made).view(np.uint8).reshape(-1), kind)
    assert got.dtype == np.float32
    assert np.array_equal(got.reshape(WEIGHT.shape), dequantize(made, kind))
    assert np.abs(got.reshape(WEIGHT.shape) - WEIGHT).max() < 2.0, "and they are the weights"


# One row of the package's, more than one, and a rest.
@pytest.mark.parametrize("elements", [256, 8192, 3 * 8192 + 512])
@pytest.mark.parametrize("kind", gguf_blocks.TYPES, ids=lambda kind: kind.name)
def test_any_bytes_are_read_as_the_gguf_package_reads_them(kind: GGMLQuantizationType, elements: int) -> None:
    raw = random_blocks(kind, elements)
    with np.errstate(all="ignore"):
        expected = dequantize(raw.reshape(1, -1), kind)
    assert np.array_equal(gguf_blocks.dequantize(raw, kind), expected.reshape(-1), equal_nan=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GGUF:
    path = tmp_path_factory.mktemp("gguf") / "blocks.gguf"
    writer = GGUFWriter(str(path), "llama")
    for kind in MADE:
        writer.add_tensor(kind.name, quantize(WEIGHT, kind), raw_dtype=kind)
    writer.add_tensor("vector", quantize(WEIGHT[0], GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    stack = quantize(np.stack([WEIGHT] * 2), GGMLQuantizationType.Q4_0)
    writer.add_tensor("stack", stack, raw_dtype=GGMLQuantizationType.Q4_0)
    huge = quantize(np.full((1, 32), 60_000, np.float32), GGMLQuantizationType.Q8_0)
    huge.view(np.uint8)[0, :2] = np.frombuffer(np.float16(600).tobytes(), np.uint8)
    writer.add_tensor("huge", huge, raw_dtype=GGMLQuantizationType.Q8_0)
    absent = quantize(WEIGHT, GGMLQuantizationType.MXFP4)
    absent[0, 0] = 0xFF
    writer.add_tensor("nan", absent, raw_dtype=GGMLQuantizationType.MXFP4)
    writer.add_tensor("whole", WEIGHT.astype(np.int32), raw_dtype=GGMLQuantizationType.I32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUF(path)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_mlx_holds_the_repacked_weights_exactly(file: GGUF, name: str) -> None:
    weight, scales, biases, group_size, bits, _ = file.repack(name)
    assert biases is not None
    assert (weight.dtype, weight.shape) == (np.dtype(np.uint32), (6, 256 * bits // 32))
    assert (scales.dtype, biases.dtype) == (np.dtype(np.float16), np.dtype(np.float16))
    assert scales.shape == (6, 256 // group_size)
    scale, bias = (mx.array(part.astype(np.float32)) for part in (scales, biases))
    exact = mx.dequantize(mx.array(weight), scale, bias, group_size=group_size, bits=bits)
    assert np.array_equal(np.array(exact), file.dequantize(name))
    half = mx.dequantize(mx.array(weight), mx.array(scales), mx.array(biases), group_size=group_size, bits=bits)
    # MLX computes in the scales' type: what is left of a small weight is what float16 keeps of its group's largest.
    assert np.abs(np.array(half.astype(mx.float32)) - file.dequantize(name)).max() < np.abs(WEIGHT).max() * 2**-9


def test_mlx_holds_the_repacked_weights_of_mxfp4_exactly(file: GGUF) -> None:
    packed = file.repack("MXFP4")
    assert (packed.group_size, packed.bits, packed.mode, packed.biases) == (32, 4, "mxfp4", None)
    exact = mx.dequantize(mx.array(packed.weight), mx.array(packed.scales), mode="mxfp4", dtype=mx.float32)
    assert np.array_equal(np.array(exact), file.dequantize("MXFP4"))
    assert np.abs(np.array(exact) - WEIGHT).max() < 2.0, "and they are the weights"


def test_what_has_no_form_in_mlx_is_refused_by_name(file: GGUF) -> None:
    held = ["Q4_0", "Q4_1", "Q8_0", "MXFP4", "stack", "huge", "nan"]
    assert [name for name in file.tensors if file.repackable(name)] == held
    for name, cause in (("Q5_0", "no exact form"), ("vector", "no exact form"), ("none", "no tensor")):
        with pytest.raises(ModelError, match=cause):
            file.repack(name)
    for name in ("huge", "nan"):
        with pytest.raises(ModelError, match=rf"'{name}' has scales that are not finite"):
            file.repack(name)


def test_a_stack_of_matrices_is_held_row_below_row(file: GGUF) -> None:
    packed, alone = file.repack("stack"), file.repack("Q4_0")
    assert np.array_equal(packed.weight, np.concatenate([alone.weight] * 2))


def test_a_type_that_is_not_supported_is_refused_by_name(file: GGUF) -> None:
    with pytest.raises(ModelError, match=r"'whole' has type I32.*Q4_K"):
        file.dequantize("whole")
