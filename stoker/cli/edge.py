"""The edge of the process: its standard streams, and how it ends.

What a user's surroundings may do here is one line and an exit code, never a traceback: an encoding that cannot hold a
character, a stream that is closed, a terminal that has gone, a disk that takes no more, an interrupt at any moment.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from stoker.errors import StokerError
from stoker.local.interrupts import INTERRUPTED

#: The exit code for an `OSError` that no other code has turned into an error of Stoker's.
_FAILED = 1
#: What fails only when something is written.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


class Notes(io.FileIO):
    """Standard error: what is written there may be lost, with a terminal that has gone or on a full disk. That does not
    end the command."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Make all three standard streams usable: a closed one reads and writes nothing, and a character that the encoding
    of an output does not have is written as its number (`\\u65e5`)."""
    for name, mode in _STREAMS:
        if getattr(sys, name) is None:
            # In this order each gets its own descriptor, so that no other file gets it later.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it is open as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        kept = io.BufferedWriter(Notes(sys.stderr.fileno(), "wb", closefd=False))
        sys.stderr = io.TextIOWrapper(kept, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def run(command: Callable[[], object]) -> int:
    """The exit code of `command`, whose output is written to the end."""
    try:
        code = _code_of(command)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`stoker … | head`): that is its right.
        code = 0
    except OSError as error:
        code = _say(_described(error), _FAILED)
    _let_go_of_output()
    return code


def _code_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            # typer ends a command in this way when its reader has gone.
            return 0
        return end.code if isinstance(end.code, int) else 0 if end.code is None else _say(str(end.code), 1)
    except StokerError as error:
        return _say(str(error), error.exit_code)
    except BaseException as error:
        if not _interrupted(error):
            raise
        return INTERRUPTED
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """An interrupt can come out of a library as that library's own error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _described(error: OSError) -> str:
    why = error.strerror or str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {why}."
    # Code that writes a file names it; what has no name is standard output.
    return f"standard output: {why}." if error.errno in _WRITING else f"{why}."


def _say(text: str, code: int) -> int:
    print(f"stoker: {text}", file=sys.stderr, flush=True)
    return code


def _let_go_of_output() -> None:
    """Python writes what is left at its end, and complains if that fails again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
