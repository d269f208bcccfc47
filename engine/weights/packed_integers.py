"""Matrices of AWQ and GPTQ checkpoints, in MLX's affine form where it has one, else dense.

Both are w = scale · (code − zero), one scale and zero for the inputs of a group; codes lie (in, out), and `qzeros` has
those of a group packed along the outputs.

AWQ (AutoAWQ, version gemm): `qweight` int32 (in, out/8) packs eight outputs, in the order 0 2 4 6 1 3 5 7.
GPTQ (AutoGPTQ, GPTQModel): `qweight` int32 (in·bits/32, out) packs inputs, the lowest bits first, which is MLX's order
too. The first version of its files has zeros less one. `g_idx` says the group of each input.
"""

from __future__ import annotations

import mlx.core as mx

from engine.weights.foreign_sections import Packing
from engine.weights.quantized import GROUP_SIZES, Form, QuantizedTensor
from stoker.errors import ModelError

#: Where in its word AWQ has each of eight outputs.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class PackedIntegers:
    """Reads the matrices of one checkpoint."""

    def __init__(self, packing: Packing) -> None:
        self._awq, self._bits, self._group = packing.method == "awq", packing.bits, packing.group
        self._less_one = packing.less_one

    def read(
        self, qweight: mx.array, scales: mx.array, qzeros: mx.array | None, g_idx: mx.array | None, dtype: mx.Dtype
    ) -> QuantizedTensor | mx.array:
        """One matrix (out, in), for products in `dtype`. Raises `ModelError` for parts that do not fit together."""
        inputs, outputs = self._shape(qweight)
        group = inputs if self._group == -1 else self._group
        groups = scales.shape[0] if scales.ndim == 2 else 0
        zeros = self._zeros(qzeros, scales)
        if scales.shape != (groups, outputs) or zeros.shape != scales.shape or groups != -(-inputs // group):
            raise ModelError(
                f"{self._bits} bits in groups of {self._group}: codes {qweight.shape}, scales {scales.shape} and zeros "
                f"{None if qzeros is None else qzeros.shape} do not fit together"
            )
        scales = scales.astype(mx.float32)
        size = next((size for size in reversed(GROUP_SIZES) if group % size == 0 and inputs % size == 0), None)
        if size is None or not _in_order(g_idx, inputs, group):
            of = mx.arange(inputs) // group if g_idx is None else g_idx
            dense = (self._codes(qweight).astype(mx.float32) - zeros[of]) * scales[of]
            return mx.contiguous(dense.T).astype(dtype)
        biases = -zeros * scales
        scales, biases = (
            mx.contiguous(mx.repeat(part, group // size, axis=0).T).astype(dtype) for part in (scales, biases)
        )
        return QuantizedTensor(self._weight(qweight), scales, biases, Form(size, self._bits))

    def _shape(self, qweight: mx.array) -> tuple[int, int]:
        """(in, out)."""
        if qweight.ndim != 2 or qweight.dtype not in (mx.int32, mx.uint32):
            raise ModelError(f"its codes are {qweight.dtype} {qweight.shape}, not a matrix of int32")
        first, second = qweight.shape
        return (first, second * 8) if self._awq else (first * 32 // self._bits, second)

    def _zeros(self, qzeros: mx.array | None, scales: mx.array) -> mx.array:
        """(groups, out) float32. Without any the form is symmetric."""
        if qzeros is None:
            return mx.full(scales.shape, 1 << (self._bits - 1), dtype=mx.float32)
        codes = _awq(qzeros) if self._awq else _unpacked(qzeros, self._bits)
        if self._less_one:
            codes = (codes + 1) & ((1 << self._bits) - 1)
        return codes.astype(mx.float32)

    def _codes(self, qweight: mx.array) -> mx.array:
        """(in, out)."""
        return _awq(qweight) if self._awq else _unpacked(mx.contiguous(qweight.T), self._bits).T

    def _weight(self, qweight: mx.array) -> mx.array:
        """(out, in·bits/32), as MLX packs."""
        if not self._awq:
            return mx.contiguous(qweight.T).view(mx.uint32)
        codes = _awq(qweight).T
        words = codes.reshape(codes.shape[0], -1, 8) << (4 * mx.arange(8, dtype=mx.uint32))
        return words.sum(axis=-1).astype(mx.uint32)


def _awq(words: mx.array) -> mx.array:
    shifts = 4 * mx.array(_AWQ_PLACES, dtype=mx.uint32)
    return ((words.view(mx.uint32)[..., None] >> shifts) & 15).flatten(-2)


def _unpacked(words: mx.array, bits: int) -> mx.array:
    """The numbers of rows that are packed one after another, the lowest bits first; some cross a word's border."""
    single = (words.view(mx.uint32)[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    numbers = single.reshape(*words.shape[:-1], -1, bits) << mx.arange(bits, dtype=mx.uint32)
    return numbers.sum(axis=-1).astype(mx.uint32)


def _in_order(g_idx: mx.array | None, inputs: int, group: int) -> bool:
    """Whether the groups are runs of inputs. Raises `ModelError` for one that cannot be."""
    if g_idx is None:
        return True
    if g_idx.shape != (inputs,) or bool(((g_idx < 0) | (g_idx >= -(-inputs // group))).any()):
        raise ModelError(f"g_idx of shape {g_idx.shape} does not name a group for each of {inputs} inputs")
    return bool(mx.array_equal(g_idx, mx.arange(inputs) // group))
