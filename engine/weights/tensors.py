"""The tensors of a model on their way from file to layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from stoker.errors import ModelError

#: Reads one tensor: called once, when a layer takes it, so that only one is in memory in its file's form.
Reader = Callable[[], mx.array]


class Tensors:
    """Hands every named tensor to one layer, in the dtype that the model computes in.

    Raises `ModelError` for a tensor that is missing, of another shape, or left over (`finish`).
    """

    def __init__(
        self, readers: Mapping[str, Reader], shapes: Mapping[str, tuple[int, ...]], where: str, dtype: mx.Dtype
    ):
        self._readers, self._shapes, self._where, self._dtype = dict(readers), shapes, where, dtype
        #: What the layers took, by the file's names, evaluated.
        self.taken: dict[str, mx.array] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def take(self, name: str, shape: tuple[int, ...], *, transpose: bool = False) -> mx.array:
        """The tensor `name`, which must have `shape` in the file; transposed and contiguous if so asked."""
        reader = self._readers.pop(name, None)
        if reader is None:
            raise ModelError(f"{self._where}: the tensor {name!r} of shape {shape} is missing")
        if tuple(self._shapes[name]) != shape:
            raise ModelError(f"{self._where}: tensor {name!r} has shape {tuple(self._shapes[name])}, not {shape}")
        array = reader().astype(self._dtype)
        array = mx.contiguous(array.T) if transpose else array
        mx.eval(array)
        self.taken[name] = array
        return array

    def finish(self, *, ignore: Callable[[str], bool] = lambda name: False) -> None:
        """Refuse tensors that no layer took: what they mean would be lost."""
        surplus = sorted(name for name in self._readers if not ignore(name))
        if surplus:
            names = ", ".join(surplus[:3])
            raise ModelError(f"{self._where}: {len(surplus)} tensors that this architecture does not have: {names}")
