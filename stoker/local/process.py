"""A child process under a guard, with a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.files.secret import opener
from stoker.local import guard
from stoker.settings import Settings


def how_it_ended(code: int) -> str:
    """In words, behind "ended with": by the exit code of a process, or of the guard that it had."""
    number = -code if code < 0 else code - 128
    if number not in {each.value for each in signal.Signals}:
        return f"exit code {code}"
    why = ", which the system sends where memory runs out" if number == signal.SIGKILL else ""
    return signal.Signals(number).name + why


@dataclass(frozen=True)
class LogSize:
    """`bytes` that a log file may have, and how many `files` that were full are kept, as `NAME.log.1` and so on."""

    bytes: int = 8 * 2**20
    files: int = 3

    @classmethod
    def of(cls, settings: Settings) -> LogSize:
        return cls(settings.log_size * 2**20, settings.log_files)


class Process:
    """Starts on creation. Ends when `stop` is called, or when this process ends, however it ends. Its guard writes what
    it says into `log`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str],
        grace: float,
        size: LogSize = LogSize(),
    ) -> None:
        self.name, self.log, self._grace, self._size = name, log, grace, size
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab", opener=opener) as file:
            #: Where in which file its output begins.
            self._offset, self._began = file.tell(), os.fstat(file.fileno()).st_ino
            limits = str(grace), str(log), str(size.bytes), str(size.files)
            self._guard = subprocess.Popen(
                [sys.executable, str(guard.__file__), *limits, *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                # A session of its own: Ctrl-C in the terminal must reach us alone, or children would die out of order.
                start_new_session=True,
                # What it writes is for this user alone, unless it says otherwise.
                umask=0o077,
            )

    @property
    def returncode(self) -> int | None:
        return self._guard.poll()

    def ask_to_stop(self) -> None:
        if self._guard.stdin is not None and not self._guard.stdin.closed:
            self._guard.stdin.close()

    def stop(self) -> int:
        """Ask, wait for the grace time, and return the exit code."""
        self.ask_to_stop()
        try:
            return self._guard.wait(self._grace + 5)
        except subprocess.TimeoutExpired:
            # The guard kills its command after the grace time; one that is itself stuck takes its session along.
            os.killpg(self._guard.pid, signal.SIGKILL)
            return self._guard.wait()

    def output(self) -> str:
        """What this process has written so far, as far as it is kept."""
        said: list[bytes] = []
        for path in (self.log, *(Path(f"{self.log}.{number}") for number in range(1, self._size.files + 1))):
            try:
                with path.open("rb") as file:
                    is_first = os.fstat(file.fileno()).st_ino == self._began
                    file.seek(self._offset if is_first else 0)
                    said.append(file.read())
            except FileNotFoundError:
                continue
            if is_first:
                break
        return b"".join(reversed(said)).decode(errors="replace")
