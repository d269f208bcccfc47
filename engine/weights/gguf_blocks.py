"""GGUF's quantized blocks: to float32, or repacked without loss into a form of MLX's.

The block layouts are ggml's (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). Every type is
dequantized by `gguf.quants`, whose NumPy code is the reference; it goes 16 rows at a time, so it is twice as fast on
rows that are made long first. Through a form of MLX's, where there is one, it takes half as long (`folder.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

#: Types that a model may be stored in.
TYPES = tuple(
    GGMLQuantizationType[name]
    for name in (
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
        "TQ1_0", "TQ2_0",
    )
)  # fmt: skip
#: Those whose blocks a form of MLX's holds exactly.
REPACKED = tuple(GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0", "MXFP4"))
#: Elements of a block of those, which is also the group size of what they become.
GROUP_SIZE = 32

#: Elements that `gguf.quants` is given as one row: 16 of them stay within a core's cache.
_ROW = 8192


class Packed(NamedTuple):
    """A form of MLX's, the lowest bits first. affine: element j of a group is `scale · q[j] + bias`, q unsigned.

    `weight` uint32 (out, in·bits/32), `scales` and `biases` float16 (out, in/group_size). mxfp4: `scales` uint8, and
    no biases.
    """

    weight: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[np.float16] | None
    group_size: int
    bits: int
    mode: str

    @property
    def finite(self) -> bool:
        """Whether every scale is a number: a byte of ones is none."""
        if self.biases is None:
            return bool((self.scales != 0xFF).all())
        return bool(np.isfinite(self.scales).all() and np.isfinite(self.biases).all())


def dequantize(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """float32 (elements,) of `raw` uint8 (blocks · bytes of a block,), equal to `gguf.quants.dequantize` to the bit."""
    from gguf.quants import dequantize as reference

    if kind is GGMLQuantizationType.F32:
        return raw.view("<f4").astype(np.float32)
    if kind is GGMLQuantizationType.F16:
        return raw.view("<f2").astype(np.float32)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = _ROW // block * block_bytes
    whole = len(raw) // row_bytes * row_bytes
    out = np.empty(len(raw) // block_bytes * block, np.float32)
    # Scales of a damaged file may be infinite: what comes of them is for the caller to judge, not to warn of.
    with np.errstate(all="ignore"):
        for start, end, width in ((0, whole, row_bytes), (whole, len(raw), len(raw) - whole)):
            if end > start:
                part = reference(raw[start:end].reshape(-1, width), kind)
                out[start // block_bytes * block : end // block_bytes * block] = part.reshape(-1)
    return out


def repack(raw: NDArray[np.uint8], shape: tuple[int, int], kind: GGMLQuantizationType) -> Packed:
    """A matrix `shape` (out, in) of one of `REPACKED` in MLX's form, each weight the same number as before.

    Q4_0 is d·(q − 8), Q4_1 is d·q + m, Q8_0 is d·q with signed q. The biases −8·d and −128·d are exact in float16
    while they do not overflow, which the caller sees as infinity. MXFP4 has MLX's codes and scales in another order.
    """
    rows, columns = shape
    block_bytes = GGML_QUANT_SIZES[kind][1]
    blocks = raw.reshape(-1, block_bytes)
    words, scales, biases, bits = _REPACKERS[kind](blocks)
    groups = (rows, columns // GROUP_SIZE)
    if biases is None:
        return Packed(words.reshape(rows, -1), scales.reshape(groups), None, GROUP_SIZE, bits, "mxfp4")
    return Packed(words.reshape(rows, -1), scales.reshape(groups), biases.reshape(groups), GROUP_SIZE, bits, "affine")


_Parts = tuple[NDArray[np.uint32], NDArray[Any], NDArray[np.float16] | None, int]


def _q4_0(blocks: NDArray[np.uint8]) -> _Parts:
    scales = _halves(blocks, 0)
    return _nibbles(blocks[:, 2:]), scales, _times(scales, -8), 4


def _q4_1(blocks: NDArray[np.uint8]) -> _Parts:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2), 4


def _q8_0(blocks: NDArray[np.uint8]) -> _Parts:
    # Flipping a signed byte's top bit adds 128.
    words = (blocks[:, 2:] ^ np.uint8(0x80)).view("<u4")
    scales = _halves(blocks, 0)
    return words, scales, _times(scales, -128), 8


def _mxfp4(blocks: NDArray[np.uint8]) -> _Parts:
    return _nibbles(blocks[:, 1:]), np.ascontiguousarray(blocks[:, 0]), None, 4


_REPACKERS: dict[GGMLQuantizationType, Callable[[NDArray[np.uint8]], _Parts]] = dict(
    zip(REPACKED, (_q4_0, _q4_1, _q8_0, _mxfp4), strict=True)
)


def _halves(blocks: NDArray[np.uint8], at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").reshape(-1)


def _times(scales: NDArray[np.float16], factor: int) -> NDArray[np.float16]:
    # What is not finite afterwards, in a damaged file, is for the caller to refuse.
    with np.errstate(over="ignore", invalid="ignore"):
        return scales * np.float16(factor)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """ggml pairs element i with element i + 16, MLX with its neighbour: (blocks, 16) bytes to (blocks, 4) words."""
    out = np.empty_like(packed, order="C")
    even, odd = packed[:, 0::2], packed[:, 1::2]
    out[:, :8] = (even & 0x0F) | (odd << 4)
    out[:, 8:] = (even >> 4) | (odd & 0xF0)
    return out.view("<u4")
