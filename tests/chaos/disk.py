"""The disk of the fleet's runs and adapters, which can be full, and cannot be written for a while.

A file system of its own for each folder, in memory, where this system lets us mount one. Elsewhere a worker's limit
on the size of a file stands for the full disk (writing fails in the same place), and permissions for the other.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

#: Megabytes of a mounted disk: many times what a storm writes.
SIZE = 64
#: To lock a mounted one: that is not done while a file is open for writing.
TRIES = 20
#: A program that waits until its standard input is closed, as it is when this process ends in any way, and unmounts.
#: Lazily: a process that has just ended may hold a file for a moment.
_UNMOUNTS = 'cat >/dev/null; for folder; do umount -l "$folder"; done'
_FILLER = "filler"


class Disk:
    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._limited: list[int] = []
        for folder in self._folders:
            folder.mkdir(parents=True)
        options = f"size={SIZE}m,mode=700"
        command = ["sh", "-c", _UNMOUNTS, "sh", *map(str, self._folders)]
        # It is there before the first mount. A signal to the group of this process is not for it.
        self._unmounts = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._mounted = [folder for folder in self._folders if _run("mount", "-t", "tmpfs", "-o", options, "x", folder)]

    def fill(self, pids: Iterable[int]) -> None:
        """No byte more; `pids`: of the workers that use it."""
        for folder in self._mounted:
            with (folder / _FILLER).open("wb", buffering=0) as file:
                _write_all(file.fileno())
        if not self._mounted:
            self._limited = [pid for pid in pids if _limit(pid, 512)]

    def lock(self) -> bool:
        """Nothing can be written from now on; False where a file is open for writing all the time."""
        locked = [self._locked(folder) for folder in self._folders]
        return all(locked)

    def _locked(self, folder: Path) -> bool:
        if folder not in self._mounted:
            folder.chmod(0o500)
            return True
        for _ in range(TRIES):
            if _run("mount", "-o", "remount,ro", folder):
                return True
            time.sleep(0.05)
        return False

    def mend(self) -> None:
        for folder in self._folders:
            if folder in self._mounted:
                _run("mount", "-o", "remount,rw", folder)
                (folder / _FILLER).unlink(missing_ok=True)
            else:
                folder.chmod(0o700)
        for pid in self._limited:
            _limit(pid, resource.RLIM_INFINITY)
        self._limited = []

    def close(self) -> None:
        """Nothing of it stays mounted, as when this process is killed."""
        self._unmounts.communicate(timeout=30)


def _run(*command: str | Path) -> bool:
    try:
        return subprocess.run([*map(str, command)], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _write_all(handle: int) -> None:
    """Until there is no room, to the last byte."""
    size = 1 << 20
    while size:
        try:
            os.write(handle, bytes(size))
        except OSError:
            size //= 2


def _limit(pid: int, size: int) -> bool:
    try:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    except ProcessLookupError:
        return False
    return True
