"""Vectors on the wire: safetensors bytes, in float32, float16, or in int8 with a scale for each vector.

NumPy is loaded when the first vectors come: a client that only generates does without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VectorType = Literal["float32", "float16", "int8"]


@dataclass(frozen=True, eq=False)
class Embedded:
    """What the engine makes of an embedding job. `vectors`: float32, a row for each text; `tokens`: of all texts."""

    vectors: NDArray[np.float32]
    tokens: int
    run_seconds: float


@dataclass(frozen=True, eq=False)
class Int8Vectors:
    """`codes` int8 (rows, dim) and `scales` float32 (rows,): vector i is codes[i] · scales[i], off by at most
    scales[i] / 2 in each number."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.codes)

    def to_float32(self) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self.codes * self.scales[:, None]
        return vectors


#: What a job made, as it travelled: float32 or float16 (rows, dim), or `Int8Vectors`.
Encoded: TypeAlias = "np.ndarray | Int8Vectors"


def quantize(vectors: NDArray[np.float32]) -> Int8Vectors:
    """Symmetric: each vector's largest number becomes ±127. A vector of zeros stays one."""
    import numpy as np

    scales = np.abs(vectors).max(axis=1) / np.float32(127)
    codes = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
    return Int8Vectors(codes.astype(np.int8), scales.astype(np.float32))


def save(vectors: NDArray[np.float32], dtype: VectorType) -> bytes:
    """float32 (rows, dim) as the safetensors bytes of a job's blob: `vectors`, and `scales` if they are int8."""
    import numpy as np
    import safetensors.numpy

    if dtype == "int8":
        small = quantize(vectors)
        return safetensors.numpy.save({"vectors": small.codes, "scales": small.scales})
    return safetensors.numpy.save({"vectors": np.ascontiguousarray(vectors, dtype=dtype)})


def load(data: bytes) -> Encoded:
    """The inverse of `save`. Raises `ValueError` for other bytes."""
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load(data)
        return Int8Vectors(tensors["vectors"], tensors["scales"]) if "scales" in tensors else tensors["vectors"]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"no vectors ({error})") from None


def is_of(vectors: Encoded, rows: int, dim: int, dtype: VectorType) -> bool:
    """Whether they are `rows` vectors of `dim` numbers of that type."""
    if isinstance(vectors, Int8Vectors):
        right = vectors.scales.shape == (rows,) and vectors.scales.dtype == "float32"
        return right and dtype == vectors.codes.dtype and vectors.codes.shape == (rows, dim)
    return dtype == vectors.dtype and vectors.shape == (rows, dim)


def plain(vectors: Encoded) -> np.ndarray:
    """As an array: int8 becomes float32 again."""
    return vectors.to_float32() if isinstance(vectors, Int8Vectors) else vectors
