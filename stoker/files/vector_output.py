"""Files of vectors that grow row by row: NumPy's, safetensors and Parquet.

While they grow the rows lie under the final file's header, where they will be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stoker.contract.vectors import Encoded, Int8Vectors
from stoker.errors import ConfigError, InvalidRequest, ModelError
from stoker.files.durable import flush
from stoker.files.output import Output, check_path, partial_path


@dataclass(frozen=True)
class Column:
    """`name` and the bytes of it in the final file: its first row begins at `offset`."""

    name: str
    dtype: str
    #: Numbers of a row.
    width: int
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """A file's header and its columns, each of which has room for every row."""

    header: bytes
    columns: tuple[Column, ...]


def npy_layout(rows: int, dim: int, dtype: str) -> Layout:
    """NumPy's format, version 1.0: one array, so no int8, which needs a second one for its scales."""
    described = repr({"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": (rows, dim)})
    # Magic, version and length take 10 bytes; the data begins at a multiple of 64.
    text = described.ljust(-(-(len(described) + 11) // 64) * 64 - 11) + "\n"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1")
    return Layout(header, (Column("vectors", dtype, dim, len(header)),))


def safetensors_layout(rows: int, dim: int, dtype: str) -> Layout:
    """safetensors: `vectors`, and `scales` if they are int8."""
    names = {"float32": "F32", "float16": "F16", "int8": "I8"}
    tensors: dict[str, Any] = {}
    columns, end = [], 0
    shapes = [("vectors", dtype, dim)] + ([("scales", "float32", 1)] if dtype == "int8" else [])
    # The wider numbers first, so that each tensor is aligned.
    for name, kind, width in sorted(shapes, key=lambda shape: -np.dtype(shape[1]).itemsize):
        size = rows * width * np.dtype(kind).itemsize
        shape = [rows] if name == "scales" else [rows, width]
        tensors[name] = {"dtype": names[kind], "shape": shape, "data_offsets": [end, end + size]}
        columns.append(Column(name, kind, width, end))
        end += size
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = tuple(Column(c.name, c.dtype, c.width, start + c.offset) for c in columns)
    return Layout(len(text).to_bytes(8, "little") + text, placed)


LAYOUTS: Mapping[str, Callable[[int, int, str], Layout]] = {
    ".npy": npy_layout,
    ".safetensors": safetensors_layout,
    ".parquet": safetensors_layout,  # until it is whole: Parquet cannot be gone on with
}


def check_output(path: Path, dtype: str, overwrite: bool) -> None:
    """Raises `InvalidRequest` for an output that cannot be written, before any work is done for it."""
    check_path(path, LAYOUTS, overwrite)
    if path.suffix == ".npy" and dtype == "int8":
        raise InvalidRequest("--output: .npy cannot hold the scales of int8. Use .safetensors or .parquet.")
    if path.suffix == ".parquet":
        _pyarrow()


class VectorOutput(Output):
    """Vectors on their way into a file."""

    _layout: Layout | None = None

    @property
    def dim(self) -> int:
        """Numbers of a vector; 0 before the first one is there."""
        columns = self._layout.columns if self._layout else ()
        return next((column.width for column in columns if column.name == "vectors"), 0)

    def write(self, vectors: Encoded) -> None:
        """The next rows."""
        arrays = _arrays(vectors)
        layout = self._begun(arrays["vectors"].shape[1])
        for column in layout.columns:
            data = np.ascontiguousarray(arrays[column.name], dtype=column.dtype)
            if data.shape[1] != column.width:
                raise ModelError(f"vectors of {data.shape[1]} numbers after some of {column.width}: the model changed.")
            self._put(column.offset + self.done * column.row_bytes, data.tobytes())
        self._grown(len(vectors))

    def _begun(self, dim: int) -> Layout:
        if self._layout is None:
            self._layout = LAYOUTS[self.path.suffix](self._rows, dim, self._job["dtype"])
            self._put(0, self._layout.header)
        return self._layout

    def _form(self) -> dict[str, int]:
        return {"dim": self.dim}

    def end_of(self, state: Mapping[str, Any]) -> int:
        layout = LAYOUTS[self.path.suffix](state["job"]["rows"], state["dim"], state["job"]["dtype"])
        return max(column.offset + int(state["done"]) * column.row_bytes for column in layout.columns)

    def _resume(self, state: Mapping[str, Any]) -> None:
        self._layout = LAYOUTS[self.path.suffix](self._rows, state["dim"], self._job["dtype"])

    def _give_name(self) -> None:
        if self.path.suffix != ".parquet":
            super()._give_name()
            return
        partial = partial_path(self.path)
        whole = self.path.with_name(self.path.name + ".partial.parquet")
        assert self._layout is not None
        _write_parquet(partial, whole, self._layout, self._rows)
        whole.replace(self.path)
        # Before the rows are gone, their copy has its name for good.
        flush(self.path.parent)
        partial.unlink()


def _arrays(vectors: Encoded) -> dict[str, np.ndarray]:
    if isinstance(vectors, Int8Vectors):
        return {"vectors": vectors.codes, "scales": vectors.scales[:, None]}
    return {"vectors": vectors}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install '.[parquet]', from a checkout.") from None
    return pyarrow


def _write_parquet(source: Path, target: Path, layout: Layout, rows: int) -> None:
    """The columns of `source` as Parquet: a list of numbers a row, and its scale if there is one; a piece at a time."""
    pyarrow = _pyarrow()
    mapped = {
        column.name: np.memmap(source, column.dtype, "r", column.offset, (rows, column.width))
        for column in layout.columns
    }

    def table(start: int, end: int) -> Any:
        columns = {}
        for name, array in mapped.items():
            flat = pyarrow.array(np.ascontiguousarray(array[start:end]).reshape(-1))
            width = array.shape[1]
            columns[name] = flat if name == "scales" else pyarrow.FixedSizeListArray.from_arrays(flat, width)
        return pyarrow.table(columns)

    with target.open("wb") as file, pyarrow.parquet.ParquetWriter(file, table(0, 0).schema) as writer:
        for start in range(0, rows, 65_536):
            writer.write_table(table(start, min(rows, start + 65_536)))
    flush(target)
