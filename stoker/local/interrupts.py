"""What asks a process to end: Ctrl-C, SIGTERM, and a terminal that closes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

#: The exit code of a process that was asked to end.
INTERRUPTED = 130
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class AskedToEnd(KeyboardInterrupt):
    """SIGTERM, or a terminal that closed: where Ctrl-C ends a part of the work, these end the program."""


def handle(handler: Callable[[int, FrameType | None], object]) -> None:
    """Have `handler` called, except for what is ignored on purpose: by `nohup`, or for a shell's background jobs."""
    for number in _ASKING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once() -> None:
    """While nothing has begun, these signals end the process at once, because there is nothing to clean up."""
    handle(lambda *_: os._exit(INTERRUPTED))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)


def hold_back() -> None:
    """Let these signals wait until the program that this process becomes (`exec`) has called `end_at_once`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)


def end_cleanly() -> None:
    """From now on each of these signals ends the process as Ctrl-C does."""
    handle(_interrupt)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else AskedToEnd
