"""Matrices of few bits, in the forms of `mx.quantize`: each group of a row shares a scale.

affine: w ≈ scale · code + bias. mxfp4 and mxfp8 (of the Open Compute Project) and nvfp4 (NVIDIA): w ≈ scale · code,
where codes and scales are small floating-point numbers, a scale one byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import mlx.core as mx

from stoker.errors import ModelError

AFFINE = "affine"
#: What MLX packs. Codes of 3, 5 and 6 bits cross the borders of their 32-bit words.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
#: Mode -> the one (group size, bits) that it has.
SMALL_FLOATS = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
MODES = (AFFINE, *SMALL_FLOATS)


@dataclass(frozen=True)
class Form:
    """How a matrix is quantized. Raises `ModelError` for a form that MLX does not have."""

    group_size: int
    bits: int
    mode: str = AFFINE

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ModelError(f"mode {self.mode!r} given; {', '.join(MODES)} are supported")
        only = SMALL_FLOATS.get(self.mode)
        if only is not None and (self.group_size, self.bits) != only:
            raise ModelError(
                f"{self.mode} of {self.bits} bits in groups of {self.group_size} given; it has {only[1]} bits in "
                f"groups of {only[0]}"
            )
        if only is None and self.bits not in BITS:
            raise ModelError(f"{self.bits} bits given; {', '.join(map(str, BITS))} are supported")
        if only is None and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ModelError(f"a group size of {self.group_size} given; {sizes} are supported")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of `shape` is a matrix whose rows fall into whole groups; others stay dense."""
        return len(shape) == 2 and shape[1] % self.group_size == 0


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix (out, in): `weight` uint32 (out, in·bits/32), `scales` and, of the affine form, `biases` (out,
    in/group_size). `dtype`: what products with it are computed in.

    Raises `ModelError` for arrays that do not fit together.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    form: Form
    dtype: mx.Dtype = mx.float32

    def __post_init__(self) -> None:
        if self.weight.dtype != mx.uint32 or self.weight.ndim != 2 or self.scales.ndim != 2:
            raise ModelError(f"quantized codes are {self.weight.dtype} {self.weight.shape}, not a matrix of uint32")
        affine = self.form.mode == AFFINE
        if affine != (self.biases is not None) or affine == (self.scales.dtype == mx.uint8):
            biases = "no biases" if self.biases is None else "biases"
            raise ModelError(f"scales of {self.scales.dtype} with {biases} are not of mode {self.form.mode!r}")
        if affine:
            object.__setattr__(self, "dtype", self.scales.dtype)
        rows, width = self.shape
        wanted = (rows, width * self.form.bits // 32)
        biases_fit = self.biases is None or self.biases.shape == self.scales.shape
        if self.weight.shape != wanted or not biases_fit:
            raise ModelError(
                f"{self.form.bits} bits in groups of {self.form.group_size}: codes {self.weight.shape} and scales "
                f"{self.scales.shape} (and biases) do not fit together"
            )

    @property
    def bits(self) -> int:
        return self.form.bits

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that it stands for."""
        return self.scales.shape[0], self.scales.shape[1] * self.form.group_size

    @property
    def size(self) -> int:
        """The elements of the matrix that it stands for."""
        return math.prod(self.shape)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """In the order in which MLX's functions take them."""
        return (self.weight, self.scales) if self.biases is None else (self.weight, self.scales, self.biases)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def astype(self, dtype: mx.Dtype) -> QuantizedTensor:
        """For products in `dtype`, in which scales and biases are then."""
        if self.biases is None:
            return replace(self, dtype=dtype)
        return replace(self, scales=self.scales.astype(dtype), biases=self.biases.astype(dtype))

    def rows(self, ids: mx.array) -> mx.array:
        """The dense rows `ids`, of any shape."""
        biases = None if self.biases is None else self.biases[ids]
        return _dense(self.weight[ids], self.scales[ids], biases, self.form, self.dtype)

    def times_transposed(self, x: mx.array) -> mx.array:
        """x (…, in) times the transpose: (…, out)."""
        form = self.form
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=form.group_size,
            bits=form.bits,
            mode=form.mode,
        )


def quantize(array: mx.array, form: Form) -> QuantizedTensor:
    """The matrix `array` (out, in), rounded to `form`; products with it are of its dtype.

    Raises `ModelError` for rows that do not fall into whole groups.
    """
    if not form.fits(array.shape):
        raise ModelError(f"a tensor of shape {array.shape} does not fall into groups of {form.group_size}")
    weight, scales, *biases = mx.quantize(array, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return QuantizedTensor(weight, scales, biases[0] if biases else None, form, array.dtype)


def dequantize(tensor: QuantizedTensor) -> mx.array:
    """The dense matrix (out, in), in the dtype of its products."""
    return _dense(tensor.weight, tensor.scales, tensor.biases, tensor.form, tensor.dtype)


def _dense(weight: mx.array, scales: mx.array, biases: mx.array | None, form: Form, dtype: mx.Dtype) -> mx.array:
    return mx.dequantize(
        weight, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode, dtype=dtype
    )
