"""Read GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian.

A parser of our own: the reader of the `gguf` package takes 3 to 12 s on a real vocabulary, and MLX's trusts the file
and reads K-quants wrongly. Every count, length and offset is checked against the file before it is used, so nothing
larger than the file is ever allocated. What the blocks hold is `engine.weights.gguf_blocks`' business.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from engine.platform.jsonfiles import open_file
from engine.weights import gguf_blocks
from engine.weights.gguf_blocks import Packed
from engine.weights.gguf_parts import other_parts
from stoker.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Made once: a vocabulary has some 100,000 lengths.
_LAYOUTS = {code: struct.Struct(f"<{code}") for code in _SCALARS.values()}
#: Metadata arrays may hold arrays; nobody writes more than two levels.
_MAX_DEPTH = 4
_MAX_DIMS = 4
#: What has a value a token; arrays of numbers elsewhere have one a layer.
_VOCABULARY = "tokenizer."
_MAX_PLAIN = 1 << 16
_MAX_NAME = 65_535


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in row-major order (the file's own order reversed), its ggml type, and where it lies.

    `part`: in which of the model's files, from 0.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    bytes: int
    part: int = 0


class GGUF:
    """An open GGUF file: `metadata`, `tensors`, `dequantize` and `repack`. Raises `ModelError` for a damaged file.

    Metadata values are int, float, bool, str, a list of those, or, of the tokenizer, a numpy array (of numbers). Of a
    model that was split
    into several files, `path` is the first; its metadata are the model's, and all of `files` are read.
    """

    def __init__(self, path: Path):
        self.path = path
        first = _Part(path)
        self.metadata, self.tensors = first.metadata, first.tensors
        self._parts = [first, *(_Part(other) for other in other_parts(path, first.metadata))]
        self.files = [part.path for part in self._parts]
        for number, part in enumerate(self._parts[1:], 1):
            self._add(number, part)
        announced = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(self._parts) > 1 and announced != len(self.tensors):
            raise ModelError(
                f"{path}: {announced} tensors are announced, its {len(self._parts)} parts hold {len(self.tensors)}"
            )

    def _add(self, number: int, part: _Part) -> None:
        said = tuple(part.metadata.get(key) for key in ("split.no", "split.count"))
        if said != (number, len(self._parts)):
            raise ModelError(
                f"{part.path}: it says that it is part {said[0]} (from 0) of {said[1]}, not {number} of "
                f"{len(self._parts)} as its name says"
            )
        for name, info in part.tensors.items():
            if name in self.tensors:
                raise ModelError(f"{part.path}: tensor {name!r} is in {self.files[self.tensors[name].part].name} too")
            self.tensors[name] = replace(info, part=number)

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """The tensor `name` as float32, in row-major shape. Raises `ModelError` if it is absent or of no known type."""
        info = self._known(name)
        return gguf_blocks.dequantize(self._raw(info), info.type).reshape(info.shape)

    def pieces(self, name: str, elements: int = 1 << 22) -> Iterator[NDArray[np.float32]]:
        """The same values, flat, about `elements` at a time. Raises `ModelError` as `dequantize` does."""
        info = self._known(name)
        block, block_bytes = GGML_QUANT_SIZES[info.type]
        raw, step = self._raw(info), max(1, elements // block) * block_bytes
        for start in range(0, len(raw), step):
            yield gguf_blocks.dequantize(raw[start : start + step], info.type)

    def repackable(self, name: str) -> bool:
        """Whether `repack` can hold the tensor `name`: a matrix of Q4_0, Q4_1, Q8_0 or MXFP4, or a stack of some."""
        info = self.tensors.get(name)
        return info is not None and info.type in gguf_blocks.REPACKED and len(info.shape) >= 2

    def repack(self, name: str) -> Packed:
        """The matrix `name` in MLX's form, its weights unchanged; of a stack all rows, one below the other.

        Raises `ModelError` if it is absent, not `repackable`, or has scales that float16 cannot hold.
        """
        info = self._known(name)
        if not self.repackable(name):
            raise ModelError(
                f"{self.path}: tensor {name!r} of type {info.type.name} and shape {info.shape} has no exact form in "
                f"MLX; matrices of {', '.join(kind.name for kind in gguf_blocks.REPACKED)} have. Dequantize it"
            )
        *rows, columns = info.shape
        packed = gguf_blocks.repack(self._raw(info), (math.prod(rows), columns), info.type)
        if not packed.finite:
            raise ModelError(f"{self.path}: tensor {name!r} has scales that are not finite; the file is damaged")
        return packed

    def _known(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: no tensor {name!r}")
        if info.type not in gguf_blocks.TYPES:
            names = ", ".join(kind.name for kind in gguf_blocks.TYPES)
            raise ModelError(
                f"{self.path}: tensor {name!r} has type {info.type.name}, which is not supported; {names} are"
            )
        return info

    def _raw(self, info: TensorInfo) -> NDArray[np.uint8]:
        return np.frombuffer(self._parts[info.part].data, np.uint8, info.bytes, info.offset)


class _Part:
    """One file: its metadata, and where its tensors lie in `data`."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_file(path) as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from error
        reader = _Reader(self.data, path)
        tensor_count, value_count = reader.preamble()
        self.metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = reader.name()
            if key in self.metadata:
                reader.fail(f"the metadata key {key!r} occurs twice")
            value = reader.value(reader.scalar("I"))
            self.metadata[key] = value if key.startswith(_VOCABULARY) else reader.plain(key, value)
        self.tensors = reader.tensors(tensor_count, self.metadata.get("general.alignment", 32))


class _Reader:
    """A cursor over the file that fails, by name of file and cause, before it would pass the end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.position, self.size = data, path, 0, len(data)

    def fail(self, cause: str) -> NoReturn:
        raise ModelError(f"{self.path}: {cause} (before byte {self.position}); the file is damaged or cut off")

    def take(self, count: int) -> int:
        """Move past `count` bytes; the position where they start."""
        start = self.position
        if count > self.size - start:
            self.fail(f"{count} bytes are announced, {self.size - start} are left")
        self.position = start + count
        return start

    def scalar(self, code: str) -> Any:
        layout = _LAYOUTS[code]
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"a text is not valid UTF-8: {error.reason}")

    def name(self) -> str:
        text = self.string()
        if not 0 < len(text) <= _MAX_NAME:
            self.fail(f"a name of {len(text)} characters")
        return text

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"metadata type {kind} is unknown")
        if depth >= _MAX_DEPTH:
            self.fail(f"metadata arrays nest deeper than {_MAX_DEPTH}")
        return self._array(depth)

    def plain(self, key: str, value: Any) -> Any:
        """`value` without numpy's arrays, so that it can be compared with anything."""
        if isinstance(value, list):
            return [self.plain(key, item) for item in value]
        if not isinstance(value, np.ndarray):
            return value
        if len(value) > _MAX_PLAIN:
            self.fail(f"the metadata key {key[:100]!r} has {len(value)} numbers; {_MAX_PLAIN} are allowed")
        return value.tolist()

    def _array(self, depth: int) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[kind]}")
            return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize)).copy()
        # A string takes 8 bytes at least, an array 12: more cannot follow, however large the announced count.
        if count > (self.size - self.position) // 8:
            self.fail(f"an array of {count} elements is announced")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return [self.value(kind, depth + 1) for _ in range(count)]

    def preamble(self) -> tuple[int, int]:
        """(number of tensors, number of metadata values), after the magic and the version are right."""
        magic = self.data[:4]
        if magic != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file (it starts with {magic!r})")
        self.take(4)
        version = self.scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path}: GGUF version {version} is not supported (2 and 3, little-endian, are)")
        tensors, values = self.scalar("Q"), self.scalar("Q")
        if tensors > self.size // 24 or values > self.size // 12:
            self.fail(f"{tensors} tensors and {values} metadata values are announced")
        return tensors, values

    def tensors(self, count: int, alignment: object) -> dict[str, TensorInfo]:
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two")
        entries = [self._tensor_entry() for _ in range(count)]
        base = -(-self.position // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in found:
                self.fail(f"tensor {name!r} occurs twice")
            if offset % alignment:
                self.fail(f"tensor {name!r} starts at {offset}, which is not aligned to {alignment}")
            found[name] = self._placed(name, shape, kind, base + offset)
        self._check_overlap(found)
        return found

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.name()
        dims = self.scalar("I")
        if not 0 < dims <= _MAX_DIMS:
            self.fail(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dims))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        try:
            ggml = GGMLQuantizationType(kind)
        except ValueError:
            self.fail(f"tensor {name!r} has the unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[ggml]
        if any(not 0 < side < 2**31 for side in shape) or shape[-1] % block:
            self.fail(f"tensor {name!r} has shape {shape}, and {ggml.name} comes in blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if start + size > self.size:
            self.fail(f"tensor {name!r} ends at byte {start + size}, the file at {self.size}")
        return TensorInfo(shape, ggml, start, size)

    def _check_overlap(self, tensors: dict[str, TensorInfo]) -> None:
        end, previous = 0, ""
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                self.fail(f"tensors {previous!r} and {name!r} overlap")
            end, previous = info.offset + info.bytes, name
