"""Giving memory back to the system while the worker has nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from workers.capacity import Lanes

#: Seconds between two rounds.
EVERY = 10.0
#: Bytes by which the process must have grown since it last gave something back: to look for free pages takes tens of
#: milliseconds, and what is given back has to be mapped again for the next job.
GROWN = 32 << 20


class Resting:
    """Odd requests and large ones leave holes in the heap, which would stay with a worker that runs for a year."""

    def __init__(self, lanes: Lanes, resident: Callable[[], int], give_back: Callable[[], bool]) -> None:
        self._lanes, self._resident, self._give_back = lanes, resident, give_back
        #: Bytes that the process had when it last gave some back.
        self._had = 0

    @classmethod
    def in_this_process(cls, lanes: Lanes) -> Self:
        # Here, because the package loads MLX: a worker has it once it starts, and what imports its app does without.
        from engine.platform import heap

        return cls(lanes, heap.resident, heap.give_back)

    def round(self) -> None:
        """Give back what lies free, if no job is held and the process has grown."""
        if any(held for held, _ in self._lanes.load().values()) or self._resident() < self._had + GROWN:
            return
        self._give_back()
        self._had = self._resident()
