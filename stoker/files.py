"""Files that are there whole or not at all, whatever ends the process or the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, data: bytes) -> None:
    """Let `path` hold `data`: a reader, or the next start after a power cut, finds the old content or the new.

    The content is on the disk before it gets its name, and the name when this returns. One writer at a time: what a
    killed one left is written over. Raises `OSError`.
    """
    draft = path.with_name(f"{path.name}.new")
    with draft.open("wb") as file:
        file.write(data)
        flush(file)
    draft.replace(path)
    flush_folder(path.parent)


def flush(file: IO[Any]) -> None:
    """What was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """The names in `folder`, after a rename or a new file, are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
