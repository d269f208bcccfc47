"""A model's files as `Tensors`: a folder of safetensors, or one GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from numpy.typing import NDArray

from engine.sparing import Pause
from engine.weights import safetensors
from engine.weights.foreign import in_mlx_layout
from engine.weights.foreign_sections import CONFIG_KEYS
from engine.weights.gguf import GGUF
from engine.weights.gguf_names import llama_name, unpermute
from engine.weights.mlx_layout import QuantizedLayout
from engine.weights.names import canonical
from engine.weights.precision import Precision
from engine.weights.quantized import Form, QuantizedTensor, dequantize, quantize
from engine.weights.tensors import Reader, Stored, Tensors
from stoker.errors import ModelError

#: Types of GGUF that are plain numbers.
PLAIN = ("F32", "F16", "BF16")
#: What matrices of GGUF's other types become where they stay quantized: the smallest groups, so that rounding once
#: more loses least.
AGAIN = Form(32, 8)


def folder_tensors(
    folder: Path, config: dict[str, Any], precision: Precision, pause: Pause
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a folder, and its `config` without what is said there about quantization."""
    arrays = safetensors.read_folder(folder)
    dtype = precision.dtype_for(arrays.values())
    stored, config = joined(folder, config, arrays, dtype)
    # From here on `stored` alone holds the arrays, so that `pop` frees them.
    arrays.clear()
    shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    readers: dict[str, Reader] = {name: _popper(stored, name) for name in shapes}
    groups = {name: tensor.form.group_size for name, tensor in stored.items() if isinstance(tensor, QuantizedTensor)}
    return Tensors(readers, shapes, str(folder), dtype, precision.quantization, pause, groups), config


def joined(
    folder: Path, config: dict[str, Any], arrays: dict[str, mx.array], dtype: mx.Dtype
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of a folder by this engine's names, those of quantized layers as one each, for products in `dtype`;
    and its `config` without what is said there about quantization. Raises `ModelError`."""
    try:
        arrays, config = in_mlx_layout(config, arrays, dtype)
        layout = QuantizedLayout.from_config(config)
        dense, quantized = (arrays, {}) if layout is None else layout.join(arrays)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    stored: dict[str, Stored] = {**dense, **quantized}
    stored = {name: stored[file] for file, name in canonical(stored, config.get("model_type")).items()}
    return stored, {key: value for key, value in config.items() if key not in CONFIG_KEYS}


def _popper(stored: dict[str, Stored], name: str) -> Reader:
    """Lets go of the file's form of a tensor as soon as a layer has its own."""
    return lambda: stored.pop(name)


def gguf_tensors(gguf: GGUF, heads: tuple[int, int] | None, precision: Precision, pause: Pause) -> Tensors:
    """The tensors of a GGUF file by Hugging Face's names.

    `heads` (of queries, of keys) are given where the rows of q and k are in llama.cpp's order, to be put back.
    """
    readers: dict[str, Reader] = {}
    shapes, groups = {}, {}
    counts = dict(zip(("q_proj", "k_proj"), heads, strict=True)) if heads else {}
    for stored, info in gguf.tensors.items():
        name = llama_name(stored) or stored
        if name in readers:
            raise ModelError(f"{gguf.path}: tensor {stored!r} is in the file under two names")
        count = next((count for part, count in counts.items() if f".{part}." in name), 0)
        readers[name] = _gguf_reader(gguf, stored, count, precision)
        shapes[name] = info.shape
        if precision.quantization is not None and info.type.name not in PLAIN:
            groups[name] = AGAIN.group_size
    dtype = precision.dtype_for([mx.zeros(1, sixteen_bits(gguf))])
    return Tensors(readers, shapes, str(gguf.path), dtype, precision.quantization, pause, groups)


def sixteen_bits(gguf: GGUF) -> mx.Dtype:
    """The type of 16 bits that a file is made for: scales are float16 in this format, also for a model that was trained
    in another type."""
    return mx.bfloat16 if any(info.type.name == "BF16" for info in gguf.tensors.values()) else mx.float16


def _gguf_reader(gguf: GGUF, name: str, heads: int, precision: Precision) -> Reader:
    def order(rows: NDArray[Any]) -> mx.array:
        return mx.array(unpermute(rows, heads) if heads else rows)

    def read() -> Stored:
        policy, info = precision.quantization, gguf.tensors[name]
        if gguf.repackable(name):
            packed = quantized_from(gguf, name, order)
            # Dense too: the same numbers to the bit as `gguf.dequantize` in less than half its time.
            return packed if policy is not None else dequantize(packed.astype(mx.float32))
        dense = order(gguf.dequantize(name))
        keeps = policy is not None and policy.bits is None and info.type.name not in PLAIN
        return quantize(dense, AGAIN) if keeps and AGAIN.fits(info.shape) else dense

    return read


def quantized_from(gguf: GGUF, name: str, order: Callable[[NDArray[Any]], mx.array]) -> QuantizedTensor:
    """The repackable tensor `name`, its rows in another `order`. Raises `ModelError`."""
    packed = gguf.repack(name)
    weight, scales = order(packed.weight), order(packed.scales)
    biases = None if packed.biases is None else order(packed.biases)
    return QuantizedTensor(weight, scales, biases, Form(packed.group_size, packed.bits, packed.mode))
