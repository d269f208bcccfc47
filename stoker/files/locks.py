"""Locks of open files between processes: held until the file is closed, however its process ends."""

from __future__ import annotations

import fcntl
from typing import IO, Any


def try_lock(file: int | IO[Any]) -> bool:
    """Whether no other process had the lock of this file, which this one has from now on. Raises `OSError` where the
    file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
