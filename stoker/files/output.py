"""Files of vectors that grow row by row, survive an interruption, and appear under their name only when whole.

Until then the rows lie in `NAME.partial`, with the final file's header, and `NAME.partial.json` says for what input and
how many rows are safely on disk. A later run of the same input goes on behind those; anything after them is written
again.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stoker.contract.vectors import Encoded, Int8Vectors
from stoker.errors import ConfigError, InvalidRequest, ModelError
from stoker.files.durable import flush, write_whole

#: Seconds between two moments at which the rows so far are made safe.
SAFE_EVERY = 2.0


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
    if path.suffix not in LAYOUTS:
        raise InvalidRequest(f"--output: {path.name!r} given; it has to end in {', '.join(LAYOUTS)}.")
    if path.suffix == ".npy" and dtype == "int8":
        raise InvalidRequest("--output: .npy cannot hold the scales of int8. Use .safetensors or .parquet.")
    if path.suffix == ".parquet":
        _pyarrow()
    if not path.parent.is_dir():
        raise InvalidRequest(f"--output: there is no folder {path.parent}.")
    if path.exists() and not overwrite:
        raise InvalidRequest(f"--output: {path} is there already. Name another, or pass --overwrite.")


class Output:
    """Rows on their way into `path`, which holds `rows` of them in the end. Made by `opened`."""

    def __init__(self, path: Path, rows: int, job: Mapping[str, Any], file: BinaryIO) -> None:
        self._path, self._rows, self._job, self._file = path, rows, dict(job), file
        self._layout: Layout | None = None
        self._safe_at = time.monotonic()
        #: Rows that are there, and those of them that outlast a power cut.
        self.done = self._safe = 0

    @property
    def dim(self) -> int:
        """Numbers of a vector; 0 before the first one is there."""
        columns = self._layout.columns if self._layout else ()
        return next((column.width for column in columns if column.name == "vectors"), 0)

    def write(self, vectors: Encoded) -> None:
        """The next rows. Every two seconds those so far are made safe."""
        arrays = _arrays(vectors)
        layout = self._begun(arrays["vectors"].shape[1])
        for column in layout.columns:
            data = np.ascontiguousarray(arrays[column.name], dtype=column.dtype)
            if data.shape[1] != column.width:
                raise ModelError(f"vectors of {data.shape[1]} numbers after some of {column.width}: the model changed.")
            self._put(column.offset + self.done * column.row_bytes, data.tobytes())
        self.done += len(vectors)
        if time.monotonic() - self._safe_at >= SAFE_EVERY:
            self.make_safe()

    def _begun(self, dim: int) -> Layout:
        if self._layout is None:
            self._layout = LAYOUTS[self._path.suffix](self._rows, dim, self._job["dtype"])
            self._put(0, self._layout.header)
        return self._layout

    def _put(self, offset: int, data: bytes) -> None:
        with self._writing():
            self._file.seek(offset)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that takes nothing is the user's to mend: `InvalidRequest`."""
        try:
            yield
        except OSError as error:
            raise InvalidRequest(
                f"--output: {self._path} cannot be written ({error.strerror}); the first {self._safe} of its "
                f"{self._rows} rows are safe. Mend that and give the command again: it goes on behind them."
            ) from None

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on behind the rows that an earlier run made safe."""
        self._layout = LAYOUTS[self._path.suffix](self._rows, state["dim"], self._job["dtype"])
        self.done = self._safe = state["done"]

    def make_safe(self) -> None:
        """Flush the rows to the disk, then record in the state file how many there are."""
        self._safe_at = time.monotonic()
        if self._layout is None:
            return
        record = json.dumps({"job": self._job, "dim": self.dim, "done": self.done})
        with self._writing():
            flush(partial_path(self._path))
            # `write_whole` flushes the folder too, and so the name of the partial file.
            write_whole(state_path(self._path), lambda draft: draft.write_text(record))
        self._safe = self.done

    def finish(self) -> None:
        """Every row is there: give the file its name."""
        assert self.done == self._rows, f"{self.done} of {self._rows} rows are there"
        self.make_safe()
        with self._writing():
            self._give_name()

    def _give_name(self) -> None:
        partial = partial_path(self._path)
        if self._path.suffix == ".parquet":
            whole = self._path.with_name(self._path.name + ".partial.parquet")
            assert self._layout is not None
            _write_parquet(partial, whole, self._layout, self._rows)
            whole.replace(self._path)
            # Before the rows are gone, their copy has its name for good.
            flush(self._path.parent)
            partial.unlink()
        else:
            partial.replace(self._path)
        flush(self._path.parent)
        state_path(self._path).unlink()


def _arrays(vectors: Encoded) -> dict[str, np.ndarray]:
    if isinstance(vectors, Int8Vectors):
        return {"vectors": vectors.codes, "scales": vectors.scales[:, None]}
    return {"vectors": vectors}


@contextmanager
def opened(path: Path, rows: int, job: Mapping[str, Any], overwrite: bool = False) -> Iterator[Output]:
    """An output that goes on where an earlier run for the same `job` stopped, or begins anew.

    On leaving by an error the rows so far are made safe. Raises `InvalidRequest` if another run is writing it, or if
    a run for another job was interrupted and `overwrite` is False.
    """
    try:
        descriptor = os.open(partial_path(path), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InvalidRequest(f"--output: {partial_path(path)} cannot be written ({error.strerror}).") from None
    # Without a buffer: what a full disk did not take would be tried again when the file is closed.
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidRequest(f"--output: another run is writing {path} just now.") from None
        output = Output(path, rows, job, file)
        state = _state_of(path, file)
        if state and state["job"] != job and not overwrite:
            differing = ", ".join(name for name in job if state["job"].get(name) != job[name])
            raise InvalidRequest(
                f"--output: {partial_path(path)} is of an interrupted run with another {differing}. Give the same, "
                "or pass --overwrite to begin anew."
            )
        if state and state["job"] == job:
            output.resume(state)
        else:
            # The record first, and for good: it would vouch for rows that are not those it was written for.
            state_path(path).unlink(missing_ok=True)
            flush(path.parent)
            file.truncate(0)
        try:
            yield output
        except BaseException:
            with suppress(InvalidRequest):  # of a disk that takes nothing, the first error says more
                output.make_safe()
            raise


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def state_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial.json")


def _state_of(path: Path, file: BinaryIO) -> dict[str, Any]:
    """What an interrupted run left, if it fits the rows that are there."""
    try:
        state = json.loads(state_path(path).read_text())
        layout = LAYOUTS[path.suffix](state["job"]["rows"], state["dim"], state["job"]["dtype"])
        end = max(column.offset + state["done"] * column.row_bytes for column in layout.columns)
        return state if os.fstat(file.fileno()).st_size >= end else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'stoker[parquet]'.") from None
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
