"""Checkpoints quantized by AWQ, GPTQ and FP8, packed as AutoAWQ, AutoGPTQ and DeepSeek pack them, by plain loops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.weights import safetensors

#: AutoAWQ's order of eight neighbours in a word.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Codes:
    """A matrix (out, in), rounded: `weight` is what the codes stand for, by the definition of both methods."""

    def __init__(self, weight: np.ndarray, bits: int, group: int, g_idx: np.ndarray | None = None) -> None:
        self.bits, inputs = bits, weight.shape[1]
        group = inputs if group == -1 else group
        self.g_idx = np.arange(inputs, dtype=np.int32) // group if g_idx is None else g_idx
        of = [weight[:, self.g_idx == number] for number in range(self.g_idx.max() + 1)]
        low, high = (np.stack([edge(part, axis=1) for part in of]) for edge in (np.min, np.max))
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        top = (1 << bits) - 1
        self.scales = ((high - low) / top).astype(np.float16)
        # A zero of 0 has no form less one.
        self.zeros = np.clip(np.round(-low / self.scales.astype(np.float32)), 1, top).astype(np.uint32)
        scales, zeros = self.scales.astype(np.float32)[self.g_idx], self.zeros[self.g_idx].astype(np.float32)
        self.codes = np.clip(np.round(weight.T / scales) + zeros, 0, top).astype(np.uint32)
        self.weight = ((self.codes.astype(np.float32) - zeros) * scales).T

    def awq(self) -> dict[str, np.ndarray]:
        return {"qweight": _awq(self.codes), "qzeros": _awq(self.zeros), "scales": self.scales}

    def gptq(self, less: int = 1) -> dict[str, np.ndarray]:
        zeros = (self.zeros - less) & ((1 << self.bits) - 1)
        return {
            "qweight": _stream(self.codes.T, self.bits).T.copy(),
            "qzeros": _stream(zeros, self.bits),
            "scales": self.scales,
            "g_idx": self.g_idx,
        }


def _awq(numbers: np.ndarray) -> np.ndarray:
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for place, column in enumerate(_AWQ_ORDER):
        words |= numbers[:, column::8] << np.uint32(4 * place)
    return words.view(np.int32)


def _stream(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers as a run of bits, the lowest first, cut into words."""
    words = np.zeros((numbers.shape[0], numbers.shape[1] * bits // 32), np.uint32)
    for place in range(numbers.shape[1]):
        for bit in range(bits):
            at = place * bits + bit
            words[:, at // 32] |= ((numbers[:, place] >> np.uint32(bit)) & np.uint32(1)) << np.uint32(at % 32)
    return words.view(np.int32)


def fp8(weight: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes, a scale for each block, what they stand for)."""
    rows, columns = (-(-side // size) for side, size in zip(weight.shape, block, strict=True))
    scales, found, made = np.zeros((rows, columns), np.float32), np.zeros(weight.shape, np.uint8), weight.copy()
    for row in range(rows):
        for column in range(columns):
            part = slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1])
            scales[row, column] = np.abs(weight[part]).max() / 448
            found[part] = np.array(mx.to_fp8(mx.array(weight[part] / scales[row, column])))
            made[part] = _E4M3[found[part]] * scales[row, column]
    return found, scales, made


def e4m3(byte: int) -> float:
    """A number of four bits of exponent and three of fraction, without infinities."""
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, (int(byte) >> 3) & 15, int(byte) & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


_E4M3 = np.array([e4m3(byte) for byte in range(256)], np.float32)
#: The parts of a layer by their names, and the dense weight that they stand for.
Packing = Callable[[np.ndarray], tuple[Mapping[str, np.ndarray], np.ndarray]]


def awq(weight: np.ndarray) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    codes = Codes(weight, 4, 16 if weight.shape[1] % 32 else 32)
    return codes.awq(), codes.weight


def gptq(weight: np.ndarray) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    codes = Codes(weight, 4, 32)
    return codes.gptq(), codes.weight


def fp8_blocks(weight: np.ndarray) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    found, scales, made = fp8(weight, (16, 24))
    return {"weight": found, "weight_scale_inv": scales}, made


SECTIONS: dict[str, tuple[Packing, dict[str, Any]]] = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
    "fp8": (fp8_blocks, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 24]}),
}  # fmt: skip


def write(source: Path, folder: Path, method: str, **changed: Any) -> Path:
    """`folder`/quantized, and `folder`/dense with the weights that it stands for; `changed`: of the section."""
    pack, section = SECTIONS[method]
    quantized, dense = dict(safetensors.read_folder(source)), {}
    mx.eval(quantized)
    for name, array in list(quantized.items()):
        if name.endswith("_proj.weight") and array.ndim == 2 and array.shape[1] % 32 == 0:
            parts, weight = pack(np.array(array.astype(mx.float32)))
            layer = name.removesuffix(".weight")
            del quantized[name]
            quantized |= {f"{layer}.{part}": mx.array(value) for part, value in parts.items()}
            dense[name] = mx.array(weight)
        else:
            dense[name] = array
    for name, arrays in (("quantized", quantized), ("dense", dense)):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors*"))
        safetensors.write(folder / name / "model.safetensors", arrays)
    if method == "fp8":
        _name_fp8(folder / "quantized" / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    described = {**config, "quantization_config": {**section, **changed}}
    (folder / "quantized" / "config.json").write_text(json.dumps(described))
    return folder


def _name_fp8(path: Path) -> None:
    """MLX writes bytes as such."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for entry in header.values():
        if entry.get("dtype") == "U8":
            entry["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
