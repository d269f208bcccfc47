"""An adapter's files as one blob: a safetensors file with a tensor of bytes for each. No archive, so no paths in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stoker.contract.beneath import Beneath, OutsideError
from stoker.contract.shown import brief, cut, trouble
from stoker.errors import InvalidRequest

#: What an adapter's folder may hold: PEFT's files, mlx-lm's, and what Stoker knows of its own.
FILES = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "stoker.json")
MAX_BYTES = 512 * 2**20
#: How the files of a snapshot in the hub's cache lead to their content.
_BLOB = re.compile(r"\.\./\.\./blobs/([^/]+)")
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
    # As a message may hold it: a path may have bytes that are no text.
    where = str(folder)[:_LONGEST].encode("utf-8", "backslashreplace").decode()
    try:
        found = _files(folder)
    except (OSError, ValueError) as error:
        # A path with a NUL in it, or with half a surrogate pair, is no path.
        raise InvalidRequest(f"{where}: cannot be read ({trouble(error)}).") from None
    if "adapter_config.json" not in found or not {"adapter_model.safetensors", "adapters.safetensors"} & found.keys():
        raise InvalidRequest(
            f"{where}: no adapter in it; expected adapter_config.json and adapter_model.safetensors (PEFT), or "
            "adapter_config.json and adapters.safetensors (mlx-lm)."
        )
    return pack(found, str(folder) if named else None)


def _files(folder: Path) -> dict[str, bytes]:
    """What the folder holds of an adapter's files."""
    os.stat(folder)
    found: dict[str, bytes] = {}
    for name in FILES:
        room = MAX_BYTES - sum(map(len, found.values()))
        with suppress(FileNotFoundError), _opened(folder, name) as file:
            found[name] = file.read(room + 1)
            if len(found[name]) > room:
                raise InvalidRequest(f"{folder}: more than {MAX_BYTES} bytes, the most that can be loaded.")
    return found


def _opened(folder: Path, name: str) -> BinaryIO:
    """A file of the folder. A link may lead to another one of it, or where the hub's cache keeps the files of a
    snapshot: what is read is sent away. Raises `InvalidRequest` for one that leads anywhere else."""
    try:
        return Beneath(folder, name).open()
    except OutsideError:
        target = os.readlink(folder / name)
        kept = _BLOB.fullmatch(target)
        home = folder.resolve()
        if kept and home.parent.name == "snapshots":
            return Beneath(home.parents[1] / "blobs", kept[1]).open()
        raise InvalidRequest(
            f"{folder / name}: a link to {target}, which is no file of this folder. Copy the file here."
        ) from None
