"""Which tensors an entry of one model has: those of `KeyValues`, by name, dtype and shape. No MLX arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from engine.models.kv_sizes import KvSizes
from engine.weights.safetensors_header import ITEM_BYTES

#: safetensors' names of what keys, values and states are made of.
_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.int32: "I32", mx.uint32: "U32"}


class Tensor(NamedTuple):
    """`dtype`: as safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class _Part:
    """A tensor of an entry. `shape`: (heads, width) of one side of a layer, whose tensor has the tokens between them;
    the whole shape of a state."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_state: bool

    def of(self, tokens: int) -> Tensor:
        shape = self.shape if self.is_state else (self.shape[0], tokens, self.shape[1])
        return Tensor(self.name, self.dtype, (1, *shape))


@dataclass(frozen=True)
class Form:
    """`recurrent`: a state of a layer is among the tensors, and an entry serves whole or not at all."""

    parts: Sequence[_Part]
    recurrent: bool

    @classmethod
    def of(cls, sizes: KvSizes) -> Form | None:
        """None for a model that keeps numbers of a type that no entry has."""
        if any(dtype not in _DTYPES for dtype in sizes.dtypes):
            return None
        sides = (("keys", sizes.keys), ("values", sizes.values))
        parts = [
            _Part(f"{name}.{layer}", _DTYPES[side.kept_as], (side.heads, side.width), False)
            for name, of_layers in sides
            for layer, side in enumerate(of_layers)
        ]
        states = [
            _Part(f"states.{index}", _DTYPES[state.dtype], state.shape, True)
            for index, state in enumerate(sizes.states)
        ]
        return cls((*parts, *states), bool(states))

    def tensors(self, tokens: int) -> list[Tensor]:
        """Those of an entry of so many tokens, in their order in the file, behind the tokens themselves."""
        return [part.of(tokens) for part in self.parts]

    def nbytes(self, tokens: int) -> int:
        """Of keys, values and states."""
        return sum(tensor.nbytes for tensor in self.tensors(tokens))
