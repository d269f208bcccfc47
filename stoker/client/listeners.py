"""Connections that listened to jobs which have ended, kept for the next readers of the same client.

To open one (a socket, HELLO) takes a client longer than all else that it does for the end of a small job.
"""

from __future__ import annotations

import os
from typing import Generic, TypeVar

L = TypeVar("L")

#: Connections that are kept while nobody uses them.
MOST = 16


class Listeners(Generic[L]):
    """Any number of threads may take and keep."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, L]] = []

    def take(self) -> L | None:
        """The one that was kept last, which is the likeliest to be alive; None: open one. Those that a process before
        `fork` kept are the other process's."""
        while True:
            try:
                owner, listener = self._kept.pop()
            except IndexError:
                return None
            if owner == os.getpid():
                return listener

    def keep(self, listener: L) -> bool:
        """Whether it is kept: one too many is for its user to close."""
        if len(self._kept) >= MOST:
            return False
        self._kept.append((os.getpid(), listener))
        return True
