"""The tensors of a model on their way from file to layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from engine.platform.compiler import on_cpu
from engine.sparing import Pause, no_pause
from engine.weights.quantized import Form, QuantizedTensor, dequantize, quantize
from stoker.errors import ModelError

#: A tensor in its file's form.
Stored = mx.array | QuantizedTensor
#: Reads one tensor: called once, when a layer takes it, so that only one is in memory in its file's form.
Reader = Callable[[], Stored]


@dataclass(frozen=True)
class Quantization:
    """What becomes of matrices: those that the file has quantized stay so.

    With `bits`, dense ones (and those of more bits) are quantized to it in groups of `group_size` too.
    """

    bits: int | None = None
    group_size: int = 64


class Part(Protocol):
    """What a process has of a model that several share."""

    def whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a tensor of which a layer here asks for `shape`."""
        ...

    def cut(self, name: str, stored: Stored) -> Stored:
        """This process's part of a tensor. Raises `ModelError`."""
        ...


class Tensors:
    """Hands every named tensor to one layer, in the dtype that the model computes in.

    `shapes` are those of the dense tensors, also for quantized ones. Without `quantization` everything becomes dense.
    `pause` is called before each tensor is read. `groups`: of the quantized ones, how many inputs share a scale.
    Raises `ModelError` for a tensor that is missing, of another shape, of integers, or left over (`finish`).
    """

    def __init__(
        self,
        readers: Mapping[str, Reader],
        shapes: Mapping[str, tuple[int, ...]],
        where: str,
        dtype: mx.Dtype,
        quantization: Quantization | None = None,
        pause: Pause = no_pause,
        groups: Mapping[str, int] | None = None,
    ):
        self._readers, self._shapes, self._where, self._dtype = dict(readers), shapes, where, dtype
        self._quantization, self._pause, self._groups = quantization, pause, groups or {}
        #: What the layers took, by the file's names, evaluated.
        self.taken: dict[str, Stored] = {}
        #: None: the whole model is here.
        self.part: Part | None = None
        self._left: list[str] = []

    @property
    def parameters(self) -> int:
        """Numbers of the tensors that were taken, whole as the file has them, and of those that were left."""
        return sum(math.prod(self._shapes[name]) for name in (*self.taken, *self._left))

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def take(
        self, name: str, shape: tuple[int, ...], *, transpose: bool = False, dtype: mx.Dtype | None = None
    ) -> mx.array:
        """The tensor `name`, dense, which must have `shape` in the file; transposed if so asked.

        `dtype` is for the few tensors that must not be rounded to the model's.
        """
        return self._dense(name, _numbers(self._read(name, shape), dtype or self._dtype), transpose)

    def matrix(self, name: str, shape: tuple[int, int], *, transpose: bool = False) -> Stored:
        """The weight (out, in) of a linear layer or the table of an embedding, quantized if that is the policy.

        `transpose` is for the dense form; the quantized one is (out, in) always.
        """
        policy = self._quantization
        if policy is None:
            return self.take(name, shape, transpose=transpose)
        stored = self._read(name, shape)
        form = None if policy.bits is None else Form(policy.group_size, policy.bits)
        if form is not None and form.fits(shape) and _bits(stored) > form.bits:
            # From the file's own dtype: no larger copy is made, and the codes are those of `stoker models quantize`.
            dense = stored if isinstance(stored, mx.array) else _numbers(stored, self._dtype)
            stored = quantize(dense, form)
        if isinstance(stored, mx.array):
            return self._dense(name, _numbers(stored, self._dtype), transpose)
        stored = stored.astype(self._dtype)
        mx.eval(*stored.arrays)
        self.taken[name] = stored
        return stored

    def drop_copy(self, name: str, original: str) -> bool:
        """Whether the tensor `name` has the numbers of `original`, bit for bit; then it is let go of."""
        copy, first = self._readers[name](), self._readers[original]()
        same = _identical(copy, first)
        self._readers[original] = lambda: first
        if same:
            del self._readers[name]
        else:
            self._readers[name] = lambda: copy
        return same

    def leave(self, elsewhere: Callable[[str], bool]) -> None:
        """Read nothing of the tensors that another process takes."""
        self._left = [name for name in self._readers if elsewhere(name)]
        for name in self._left:
            del self._readers[name]

    def keeps_groups(self, name: str, parts: int) -> bool:
        """Whether a matrix may be cut by its inputs into so many equal parts: no group is, of its codes in the file or
        of those that it is to have."""
        policy, sizes = self._quantization, [self._groups.get(name, 1)]
        # One that is missing is refused when it is taken.
        *_, width = self._shapes.get(name) or (0,)
        if policy is not None and policy.bits is not None and width % policy.group_size == 0:
            sizes.append(policy.group_size)
        return all(width // parts % size == 0 for size in sizes)

    def finish(self, *, ignore: Callable[[str], bool] = lambda name: False) -> None:
        """Refuse tensors that no layer took: what they mean would be lost."""
        surplus = sorted(name for name in self._readers if not ignore(name))
        if surplus:
            names = ", ".join(surplus[:3])
            raise ModelError(f"{self._where}: {len(surplus)} tensors that this architecture does not have: {names}")

    def _read(self, name: str, shape: tuple[int, ...]) -> Stored:
        reader = self._readers.pop(name, None)
        if reader is None:
            raise ModelError(f"{self._where}: the tensor {name!r} of shape {shape} is missing")
        if self.part is not None:
            shape = self.part.whole(name, shape)
        if tuple(self._shapes[name]) != shape:
            raise ModelError(f"{self._where}: tensor {name!r} has shape {tuple(self._shapes[name])}, not {shape}")
        self._pause()
        stored = reader()
        # Integers are codes of a quantization that is not known here; as numbers they would mean nothing.
        if isinstance(stored, mx.array) and not mx.issubdtype(stored.dtype, mx.floating):
            raise ModelError(f"{self._where}: tensor {name!r} is of {stored.dtype}, not of floating-point numbers")
        return stored if self.part is None else self.part.cut(name, stored)

    def _dense(self, name: str, array: mx.array, transpose: bool) -> mx.array:
        if transpose:
            # On a CPU the file's own order: `engine.platform.few_rows` reads it as fast as memory gives it.
            array = array.T if on_cpu() else mx.contiguous(array.T)
        mx.eval(array)
        self.taken[name] = array
        return array


def _numbers(stored: Stored, dtype: mx.Dtype) -> mx.array:
    """The tensor, dense. Its scales get `dtype` first: their products must not be rounded to the file's 16 bits."""
    return dequantize(stored.astype(dtype)) if isinstance(stored, QuantizedTensor) else stored.astype(dtype)


def _identical(first: Stored, second: Stored) -> bool:
    if isinstance(first, QuantizedTensor) or isinstance(second, QuantizedTensor):
        if not (isinstance(first, QuantizedTensor) and isinstance(second, QuantizedTensor)):
            return False
        return first.form == second.form and all(map(_identical, first.arrays, second.arrays))
    same = first.dtype == second.dtype and first.shape == second.shape and mx.array_equal(first, second)
    return bool(same)


def _bits(stored: Stored) -> int:
    return stored.bits if isinstance(stored, QuantizedTensor) else 8 * stored.itemsize
