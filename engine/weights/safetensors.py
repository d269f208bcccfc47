"""Read and write safetensors (https://huggingface.co/docs/safetensors, "Format").

MLX's own reader trusts the header, so the header is checked first (`engine.weights.safetensors_header`); what passes
goes to `mx.load`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from engine.platform.jsonfiles import read_bytes
from engine.weights.safetensors_header import INDEX_NAME, check_header, entries, files
from stoker.errors import ModelError
from stoker.files.durable import write_whole

__all__ = [
    "INDEX_NAME",
    "check_header",
    "entries",
    "files",
    "read",
    "read_folder",
    "read_metadata",
    "read_numbers",
    "write",
]


def read(path: Path) -> dict[str, mx.array]:
    """Every tensor of one `.safetensors` file, lazily loaded. Raises `ModelError` naming the file and its defect."""
    check_header(path)
    try:
        return cast("dict[str, mx.array]", mx.load(str(path), format="safetensors"))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error


def read_numbers(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a small file in float32, from one read: for files of hundreds of small ones, of which MLX would
    read each by itself. Raises `ModelError` as `read` does, and for a dtype that is none of floating-point numbers."""
    header = check_header(path)
    data = read_bytes(path, path.stat().st_size)
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, _ = entry["data_offsets"]
        if entry["dtype"] not in _NUMBERS:
            raise ModelError(f"{path}: tensor {name!r} has dtype {entry['dtype']}; expected {', '.join(_NUMBERS)}")
        array = np.frombuffer(data, _NUMBERS[entry["dtype"]], offset=start + first, count=math.prod(entry["shape"]))
        if entry["dtype"] == "BF16":
            # The upper half of a float32.
            array = (array.astype(np.uint32) << 16).view(np.float32)
        found[name] = array.astype(np.float32, copy=False).reshape(entry["shape"])
    return found


_NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_folder(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a model folder, lazily loaded, from the files that `files` names.

    Raises `ModelError` for a missing or damaged file, an index that does not match, or a folder with pickles alone.
    """
    tensors: dict[str, mx.array] = {}
    for shard in sorted({file for file, _ in entries(folder).values()}):
        tensors |= read(shard)
    return tensors


def write(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write `arrays` to `path` (`.safetensors`), whole or not at all; `metadata` gets `format: mlx`. Raises `OSError`.

    MLX writes `null` for empty metadata, which other readers refuse, so it is never empty.
    """
    mx.eval(*arrays.values())

    def save(temporary: Path) -> None:
        # Through Python's file: MLX's own forgets why a write failed, and a full disk is worth knowing.
        with temporary.open("wb") as file:
            mx.save_safetensors(file, dict(arrays), {"format": "mlx", **(metadata or {})})

    write_whole(path, save)


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a file. Raises `ModelError` as `read` does."""
    return cast("dict[str, str]", check_header(path).get("__metadata__") or {})
