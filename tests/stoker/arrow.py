"""As much of pyarrow as `stoker.files.vector_output` uses, for machines that do not have it.

A file has a line of JSON a table, with the numbers of each column."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest


class _Writer:
    def __init__(self, file: BinaryIO, schema: list[str]) -> None:
        self._file, self._schema = file, schema

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.write(b"end\n")

    def write_table(self, table: Any) -> None:
        assert table.schema == self._schema
        self._file.write(json.dumps({name: column.tolist() for name, column in table.columns.items()}).encode() + b"\n")


def _rows_of(flat: np.ndarray, width: int) -> np.ndarray:
    assert flat.ndim == 1
    return flat.reshape(-1, width)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import pyarrow` finds it."""
    pyarrow: Any = ModuleType("pyarrow")
    pyarrow.array = np.array
    pyarrow.FixedSizeListArray = SimpleNamespace(from_arrays=_rows_of)
    pyarrow.table = lambda columns: SimpleNamespace(columns=columns, schema=list(columns))
    pyarrow.parquet = ModuleType("pyarrow.parquet")
    pyarrow.parquet.ParquetWriter = _Writer
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet)


def tables(path: Path) -> Iterator[dict[str, list[Any]]]:
    *lines, last = path.read_bytes().splitlines()
    assert last == b"end"
    return map(json.loads, lines)
