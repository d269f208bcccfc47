"""A process for work that may never end, or take all memory: a line of JSON in, a line of JSON out.

It is started by the first call and kept. It sets limits of the system for its own time and memory, which end it in the
middle of its work; then the next call starts another one. Calls from several threads wait for one another.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

from stoker.errors import ModelError

#: Address space, on Linux. macOS has no such limit; there the time limit bounds it.
MEMORY = 1 << 30
#: Seconds: Python starts in 0.1 s; a machine under load takes longer.
START_PATIENCE = 20.0
_CHILD = Path(__file__).with_name("child.py")


class LimitPassed(Exception):
    """The process ended in the middle of its work."""


class LimitedProcess:
    """`program`: a file that imports nothing of Stoker and has a function `answer(request)`, as `engine.platform.child`
    calls it. `clock`: whether a call's limit is of seconds that pass or of seconds that the program computes. `memory`:
    bytes of address space."""

    def __init__(
        self, program: Path, purpose: str, clock: Literal["passing", "computing"], *, memory: int = MEMORY
    ) -> None:
        self._program, self._purpose, self._clock, self._memory = program, purpose, clock, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process that runs now, if one does."""
        return self._process

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, str]:
        """The answer. Raises `LimitPassed`, and `ModelError` if the program does not start; `ValueError`, `TypeError`
        or `RecursionError` for a request that is not JSON."""
        line = json.dumps({**request, "seconds": seconds}, allow_nan=False).encode() + b"\n"
        with self._lock:
            process = self._running()
            try:
                _write(process, line)
                # The alarm within is the limit; this one is for a machine that has no time to let it ring.
                reply = _read_line(process, seconds + START_PATIENCE)
            except (OSError, EOFError):
                self._end()
                raise LimitPassed from None
            except BaseException:  # an answer that nobody read must not become the next call's
                self._end()
                raise
        answer: dict[str, str] = json.loads(reply)
        return answer

    def end(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        # A process that was forked from ours must not share its pipes.
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._end()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", str(_CHILD), str(self._program), self._clock, str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            _read_line(self._process, START_PATIENCE)
        except (OSError, EOFError) as error:
            self._end()
            raise ModelError(f"{self._program.name}, which {self._purpose}, does not start.") from error
        except BaseException:
            self._end()
            raise
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    if process.stdin is None:
        raise EOFError
    process.stdin.write(line)
    process.stdin.flush()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of its output. Raises `EOFError` when it ended, `TimeoutError` (an `OSError`) after `seconds`."""
    if process.stdout is None:
        raise EOFError
    parts: list[bytes] = []
    end = time.monotonic() + seconds
    while not parts or not parts[-1].endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError
        parts.append(os.read(process.stdout.fileno(), 1 << 20))
        if not parts[-1]:
            raise EOFError
    return b"".join(parts)
