"""Run a command that must not outlive the process that asked for it: `python guard.py GRACE LOG BYTES FILES COMMAND…`.

The asker holds the other end of this process's standard input. When it closes that end, or dies in any way
(`kill -9` included), the pipe ends, and the command gets SIGTERM and, GRACE seconds later, SIGKILL. A pipe does this on
every Unix; a parent-death signal exists on Linux alone. Standard library only: it starts in milliseconds. Where its
input is no pipe, as launchd's is not, a signal alone ends it.

What the command writes goes through this process into the file LOG, which has BYTES at most: then it is renamed to
LOG.1, what was LOG.1 to LOG.2, up to FILES of them, and another is begun.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: Seconds for which output is still read when the command has ended: a process that it left may hold the pipe for ever.
LINGER = 1.0
#: Seconds, and bytes, for which the beginning of a line waits for its end.
PATIENCE, LONGEST = 0.2, 1 << 20


class RotatingLog:
    """A file that is appended to, by more than one process at a time, and that is renamed when it is full.

    A line is whole in one file. What a full disk does not take is left out and counted; the command goes on.
    """

    def __init__(self, path: str, most: int, files: int) -> None:
        self._path, self._most, self._files = path, most, files
        self._lost, self._in_line = 0, False
        self._file = self._open()

    def _open(self) -> int:
        """With a shared lock, which says that the file is written: `stoker clean` deletes none that has one."""
        while True:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # On a disk without locks none can be had, and `stoker clean` leaves every log.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
            if self._is_current(file):
                return file
            # It was deleted, or put aside, a moment before the lock.
            os.close(file)

    def write(self, data: bytes) -> None:
        if not self._in_line and not self._is_current(self._file):
            # Deleted by hand, perhaps with its folder: nobody would ever read what went into it.
            with suppress(OSError):
                self._begin_another()
        while data:
            piece = data[: self._fits(data)]
            if not piece:
                self._rotate()
                continue
            self._put(piece)
            data = data[len(piece) :]

    def _fits(self, data: bytes) -> int:
        """How many bytes of `data` go into this file: whole lines, and the rest of one that was begun here."""
        size = os.fstat(self._file).st_size
        room = self._most - size
        if len(data) <= room:
            return len(data)
        fits = data.rfind(b"\n", 0, max(0, room)) + 1
        if fits or (size and not self._in_line):
            return fits
        # A line that was begun here, or that is longer than a file.
        return data.find(b"\n") + 1 or len(data)

    def _put(self, piece: bytes) -> None:
        self._in_line = not piece.endswith(b"\n")
        try:
            if self._lost:
                os.write(self._file, b"%d bytes are missing here: they could not be written\n" % self._lost)
                self._lost = 0
            written = 0
            while written < len(piece):
                written += os.write(self._file, piece[written:])
        except OSError:
            self._lost += len(piece)

    def _rotate(self) -> None:
        """Another process may have renamed the file: then what has its name now is written on."""
        try:
            with self._alone():
                if self._is_current(self._file):
                    self._put_aside()
            self._begin_another()
        except OSError:
            # A file that grows loses nothing.
            self._most *= 2

    def _begin_another(self) -> None:
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        fresh = self._open()
        os.close(self._file)
        self._file = fresh

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other guard puts logs of this folder aside meanwhile. The lock of the file itself is for its life."""
        folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _put_aside(self) -> None:
        for number in range(self._files, 0, -1):
            before = self._path if number == 1 else f"{self._path}.{number - 1}"
            if os.path.exists(before):
                os.replace(before, f"{self._path}.{number}")

    def _is_current(self, file: int) -> bool:
        """Whether it has its name still."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(file))
        except OSError:
            # Also of a disk that fails: what is written is lost then, and the command goes on.
            return False


def main(grace: float, log: RotatingLog, command: list[str]) -> int:
    """Returns the command's exit code; of one that a signal ended 128 and its number, as shells do."""
    asked = threading.Event()
    # Handlers first: a signal that comes between the two would end this process and leave the child.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    pump = threading.Thread(target=_pump, args=(child, log), daemon=True)
    pump.start()
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_await_end_of_input, args=(asked,), daemon=True).start()
    code = _wait(child, asked, grace)
    pump.join(LINGER)
    return code if code >= 0 else 128 - code


def _pump(child: subprocess.Popen[bytes], log: RotatingLog) -> None:
    """Whole lines at once, so that those of two processes with one log do not mix; the beginning of one, if its rest
    takes long."""
    assert child.stdout is not None
    source, held = child.stdout.fileno(), b""
    while True:
        if held and (len(held) > LONGEST or not select.select([source], [], [], PATIENCE)[0]):
            log.write(held)
            held = b""
        data = os.read(source, 1 << 16)
        end = data.rfind(b"\n") + 1 if data else 0
        if not data or end:
            log.write(held + data[:end])
            held = b""
        if not data:
            return
        held += data[end:]


def _wait(child: subprocess.Popen[bytes], asked: threading.Event, grace: float) -> int:
    while child.poll() is None:
        if asked.wait(0.1):
            return _end(child, grace)
    return child.returncode


def _await_end_of_input(asked: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    asked.set()


def _end(child: subprocess.Popen[bytes], grace: float) -> int:
    child.terminate()
    try:
        return child.wait(grace)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


if __name__ == "__main__":
    grace, path, most, files, *command = sys.argv[1:]
    sys.exit(main(float(grace), RotatingLog(path, int(most), int(files)), command))
