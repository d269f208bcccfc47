"""Matrices of few bits, in the affine layout of `mx.quantize`: w ≈ scale · code + bias, one pair a group of a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from stoker.errors import ModelError

#: What MLX packs. Codes of 3, 5 and 6 bits cross the borders of their 32-bit words.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix (out, in): `weight` uint32 (out, in·bits/32), `scales` and `biases` (out, in/group_size).

    Raises `ModelError` for bits or a group size that MLX does not have, or arrays that do not fit together.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    def __post_init__(self) -> None:
        check(self.group_size, self.bits)
        if self.weight.dtype != mx.uint32 or self.weight.ndim != 2 or self.scales.ndim != 2:
            raise ModelError(f"quantized codes are {self.weight.dtype} {self.weight.shape}, not a matrix of uint32")
        rows, width = self.shape
        wanted = (rows, width * self.bits // 32)
        if self.weight.shape != wanted or self.biases.shape != self.scales.shape or self.weight.shape[0] != rows:
            raise ModelError(
                f"{self.bits} bits in groups of {self.group_size}: codes {self.weight.shape}, scales "
                f"{self.scales.shape} and biases {self.biases.shape} do not fit together"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that it stands for."""
        return self.scales.shape[0], self.scales.shape[1] * self.group_size

    @property
    def size(self) -> int:
        """The elements of the matrix that it stands for."""
        return math.prod(self.shape)

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """In the order in which MLX's functions take them."""
        return self.weight, self.scales, self.biases

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def astype(self, dtype: mx.Dtype) -> QuantizedTensor:
        """With scales and biases in `dtype`, the one that products with it are computed in."""
        scales, biases = self.scales.astype(dtype), self.biases.astype(dtype)
        return QuantizedTensor(self.weight, scales, biases, self.group_size, self.bits)


def check(group_size: int, bits: int) -> None:
    """Raise `ModelError` unless MLX has this form."""
    if bits not in BITS:
        raise ModelError(f"{bits} bits given; {', '.join(map(str, BITS))} are supported")
    if group_size not in GROUP_SIZES:
        raise ModelError(f"a group size of {group_size} given; {', '.join(map(str, GROUP_SIZES))} are supported")


def fits(shape: tuple[int, ...], group_size: int) -> bool:
    """Whether a tensor of `shape` is a matrix whose rows fall into whole groups; others stay dense."""
    return len(shape) == 2 and shape[1] % group_size == 0


def quantize(array: mx.array, group_size: int, bits: int) -> QuantizedTensor:
    """The matrix `array` (out, in), rounded to `bits`; scales and biases are of its dtype.

    Raises `ModelError` for a form that MLX does not have, or rows that do not fall into whole groups.
    """
    check(group_size, bits)
    if not fits(array.shape, group_size):
        raise ModelError(f"a tensor of shape {array.shape} does not fall into groups of {group_size}")
    return QuantizedTensor(*mx.quantize(array, group_size=group_size, bits=bits), group_size, bits)


def dequantize(tensor: QuantizedTensor) -> mx.array:
    """The dense matrix (out, in), in the dtype of the scales."""
    return mx.dequantize(*tensor.arrays, group_size=tensor.group_size, bits=tensor.bits)
