"""Read and write safetensors (https://huggingface.co/docs/safetensors, "Format").

MLX's own reader trusts the header, so the header is checked first (`engine.weights.safetensors_header`); what passes
goes to `mx.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx

from engine.weights.files import write_whole
from engine.weights.safetensors_header import INDEX_NAME, check_header, files, placement
from stoker.errors import ModelError

__all__ = ["INDEX_NAME", "check_header", "files", "read", "read_folder", "read_metadata", "write"]


def read(path: Path) -> dict[str, mx.array]:
    """Every tensor of one `.safetensors` file, lazily loaded. Raises `ModelError` naming the file and its defect."""
    check_header(path)
    try:
        return cast("dict[str, mx.array]", mx.load(str(path), format="safetensors"))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error


def read_folder(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a model folder, lazily loaded, from the files that `files` names.

    Raises `ModelError` for a missing or damaged file, an index that does not match, or a folder with pickles alone.
    """
    weight_map = placement(folder)
    tensors: dict[str, mx.array] = {}
    for shard in files(folder):
        content = read(shard)
        repeated = tensors.keys() & content.keys()
        if repeated:
            raise ModelError(f"{shard}: tensor {min(repeated)!r} is in another shard too")
        tensors |= content
    missing = (weight_map or {}).keys() - tensors.keys()
    if missing:
        raise ModelError(f"{folder / INDEX_NAME}: tensor {min(missing)!r} ({len(missing)} in all) is in no shard")
    return tensors


def write(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write `arrays` to `path` (`.safetensors`), whole or not at all; `metadata` gets `format: mlx`. Raises `OSError`.

    MLX writes `null` for empty metadata, which other readers refuse, so it is never empty.
    """
    mx.eval(*arrays.values())

    def save(temporary: Path) -> None:
        try:
            mx.save_safetensors(str(temporary), dict(arrays), {"format": "mlx", **(metadata or {})})
        except RuntimeError as error:
            raise OSError(f"{path}: {error}") from error

    write_whole(path, save)


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a file. Raises `ModelError` as `read` does."""
    return cast("dict[str, str]", check_header(path).get("__metadata__") or {})
