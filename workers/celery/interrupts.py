"""The signals of a worker: Celery's, except for a start that is broken off, Ctrl-C's exit code, and SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from celery.platforms import EX_FAILURE
from celery.worker import state

from stoker.local.interrupts import INTERRUPTED, end_at_once


class Interrupts:
    """Made before Celery installs its handlers, which would forget what `nohup` asked for."""

    def __init__(self) -> None:
        self._ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Inside, the worker holds no job: what asks it to end ends it at once. Behind it Celery's handlers count.

        Celery would start a worker anew at SIGHUP, which it cannot; it is a terminal that closes, and asks to end.
        """
        interrupt, end = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if self._ignores_hangup else signal.SIG_DFL)
        end_at_once()
        yield
        signal.signal(signal.SIGINT, partial(_interrupted, interrupt))
        signal.signal(signal.SIGTERM, end)
        if not self._ignores_hangup:
            signal.signal(signal.SIGHUP, end)


def _interrupted(celerys: Any, number: int, frame: Any) -> None:
    celerys(number, frame)
    if state.should_stop == EX_FAILURE:
        state.should_stop = INTERRUPTED
