"""Other workers on this device, and whether they run streams: a file of locks that all of them open.

While a worker runs streams it holds a lock on one byte of the file: that of their best priority. Who wants to know asks
the kernel whether another process holds a lock before a byte, which takes a microsecond and changes nothing. Nothing is
ever written, and the kernel gives a lock up when its process ends, in any way: what is said cannot be stale.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.making_way import Neighbours
from stoker.address import Address
from stoker.files.private import temporary_folder, trusted
from stoker.settings import Settings

log = logging.getLogger(__name__)

WITHOUT = "bulk work here makes no way for streams of other workers on this machine: %s"

#: The C structure `flock` of 64 bit systems: its first byte or bytes, and how many, its type, and what else there is.
_LINUX, _BSD = struct.Struct("@hhqqi4x"), struct.Struct("@qqihh")
#: Names of this machine, of which a URL may have any.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class StreamLocks:
    """Raises `OSError` for a file that cannot be opened or locked; where that fails later, this worker makes way for
    nobody from then on. One for each file in a process: where it is closed, the kernel gives all its locks up.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _opened(path)
        self._announced: int | None = None
        self._given_up = False
        self._lock = threading.Lock()
        _first_lock(self._file, 1)

    def announce(self, priority: int | None) -> None:
        if priority == self._announced or self._given_up:
            return
        with self._lock, self._giving_up():
            self._reopen_if_gone()
            if priority is not None:
                _share(self._file, priority)
            if self._announced is not None:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._announced)
            self._announced = priority

    def is_ahead(self, priority: int) -> bool:
        with self._lock, self._giving_up():
            if priority and not self._given_up:
                self._reopen_if_gone()
                return _first_lock(self._file, priority) is not None
        return False

    def close(self) -> None:
        self._given_up = True
        os.close(self._file)

    def _reopen_if_gone(self) -> None:
        """What cleans the folder of temporary files up may have deleted it: others would open another one."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        except FileNotFoundError:
            pass
        fresh = _opened(self._path)
        if self._announced is not None:
            _share(fresh, self._announced)
        os.close(self._file)
        self._file = fresh

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._given_up = True
            log.warning(WITHOUT, error)


def _share(file: int, byte: int) -> None:
    """Lock a byte, as others may at the same time."""
    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, byte)


def _first_lock(file: int, bytes: int) -> int | None:
    """Of the locks that other processes have among the first `bytes`, where one is; None: there is none."""
    if sys.platform == "linux":
        kind, _, start, _, _ = _LINUX.unpack(_asked(file, _LINUX.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, bytes, 0)))
    else:
        start, _, _, kind, _ = _BSD.unpack(_asked(file, _BSD.pack(0, bytes, 0, fcntl.F_WRLCK, os.SEEK_SET)))
    return None if kind == fcntl.F_UNLCK else int(start)


def _asked(file: int, question: bytes) -> bytes:
    return fcntl.fcntl(file, fcntl.F_GETLK, question)


def _opened(path: Path) -> int:
    """Raises `PermissionError` for a folder or a file that another user may have put there."""
    folder = path.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or not trusted(folder):
        raise PermissionError(f"{folder} is not this user's alone")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def lock_file(broker: Address, device: str) -> Path:
    """The file of the workers of a broker on a device: one for all of a user's workers on this machine, of any
    STOKER_HOME."""
    where = re.sub(r"//[^/]*@", "//", broker.shown)
    for name in _LOOPBACK:
        where = where.replace(f"//{name}", "//loopback", 1)
    digest = hashlib.sha256(f"{where} {device}".encode()).hexdigest()[:16]
    return temporary_folder() / f"{digest}.streams"


def neighbours_of(settings: Settings, device: str) -> Neighbours | None:
    """Those of a worker with these settings; None where there is nothing to know them by. `device`: what it computes
    on, which `workers.machine` knows."""
    if settings.chosen_url is None:
        return None
    try:
        return StreamLocks(lock_file(settings.address, device))
    except OSError as error:
        log.warning(WITHOUT, error)
        return None
