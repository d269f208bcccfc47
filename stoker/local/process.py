"""A child process under a guard, with a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stoker.files.secret import opener
from stoker.local import guard

#: Bytes. A log larger than this at start is renamed to `NAME.log.1`, so that logs never fill the disk.
MAX_LOG = 8 * 2**20


class Process:
    """Starts on creation. Ends when `stop` is called, or when this process ends, however it ends."""

    def __init__(self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str], grace: float) -> None:
        self.name, self.log, self._grace = name, log, grace
        _rotate(log)
        with open(log, "ab", opener=opener) as file:
            self._offset = file.tell()
            self._guard = subprocess.Popen(
                [sys.executable, str(guard.__file__), str(grace), *command],
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
        """What this process has written so far."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")


def _rotate(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_LOG:
        log.replace(log.with_name(log.name + ".1"))
