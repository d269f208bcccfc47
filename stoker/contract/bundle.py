"""An adapter's files as one blob: a safetensors file with a tensor of bytes for each. No archive, so no paths in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stoker.contract.shown import brief, cut, trouble
from stoker.errors import InvalidRequest

#: What an adapter's folder may hold: PEFT's files, mlx-lm's, and what Stoker knows of its own.
FILES = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "stoker.json")
MAX_BYTES = 512 * 2**20
#: What a bundle's metadata calls the folder that it was made from, and the characters that are kept of it.
_SOURCE, _LONGEST = "source", 1024


@dataclass(frozen=True)
class AdapterInput:
    """What a loading job has besides its request: the files in a folder of the worker's, the folder that the client
    sent them from, and the version that they become (None: the next one)."""

    folder: Path
    source: str
    version: int | None


def pack(files: Mapping[str, bytes], source: str | None = None) -> bytes:
    """`source`: where they come from, for messages."""
    import numpy as np
    import safetensors.numpy

    arrays = {name: np.frombuffer(data, dtype=np.uint8) for name, data in files.items()}
    # A path may hold bytes that are no text.
    said = None if source is None else source.encode("utf-8", "replace").decode()[:_LONGEST]
    return safetensors.numpy.save(arrays, None if said is None else {_SOURCE: said})


def source(data: bytes, otherwise: str) -> str:
    """Where the files of a bundle come from, if that is said in it."""
    length = int.from_bytes(data[:8], "little")
    try:
        said = json.loads(data[8 : 8 + length])["__metadata__"][_SOURCE]
    except (ValueError, KeyError, TypeError, RecursionError):
        return otherwise
    return said if isinstance(said, str) and said.isprintable() else otherwise


def unpack(data: bytes, source: str) -> dict[str, bytes]:
    """The inverse. Raises `InvalidRequest` for anything else, and for a file that no adapter has."""
    import safetensors.numpy

    try:
        found = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InvalidRequest(f"{source}: no bundle of an adapter's files ({cut(error)}).") from None
    strange = sorted(set(found) - set(FILES))
    if strange:
        raise InvalidRequest(f"{source}: {strange[0]!r} is no file of an adapter; allowed: {', '.join(FILES)}.")
    return {name: array.tobytes() for name, array in found.items()}


def folder_of(given: object) -> Path:
    """The folder that a caller names. Raises `InvalidRequest`."""
    if isinstance(given, str | os.PathLike):
        return Path(given)
    raise InvalidRequest(f"folder: {brief(given)} given; expected the path of an adapter's folder.")


def read_folder(folder: Path, *, named: bool = False) -> bytes:
    """The files of an adapter's folder (PEFT's, mlx-lm's, or a checkpoint of Stoker), packed; `named`: with its path,
    so that a worker that refuses them can name it.

    Raises `InvalidRequest` for a folder that holds none, or too much.
    """
    try:
        found = {name: folder / name for name in FILES if (folder / name).is_file()}
        weights = {"adapter_model.safetensors", "adapters.safetensors"} & found.keys()
        if "adapter_config.json" not in found or not weights:
            raise InvalidRequest(
                f"{folder}: no adapter in it; expected adapter_config.json and adapter_model.safetensors (PEFT), or "
                "adapter_config.json and adapters.safetensors (mlx-lm)."
            )
        for path in found.values():
            _check_link(folder, path)
        size = sum(path.stat().st_size for path in found.values())
        if size > MAX_BYTES:
            raise InvalidRequest(f"{folder}: {size} bytes; at most {MAX_BYTES} can be loaded.")
        return pack({name: path.read_bytes() for name, path in found.items()}, str(folder) if named else None)
    except (OSError, ValueError) as error:
        # A path with a NUL in it, or with half a surrogate pair, is no path.
        raise InvalidRequest(f"{folder}: cannot be read ({trouble(error)}).") from None


def _check_link(folder: Path, path: Path) -> None:
    """A link may lead to another file of the folder, or where the hub's cache keeps the files of a snapshot: what is
    read is sent away. Raises `InvalidRequest` for one that leads anywhere else."""
    target, home = path.resolve(), folder.resolve()
    allowed = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(root) for root in allowed):
        raise InvalidRequest(f"{path}: a link to {target}, which is no file of this folder. Copy the file here.")
