"""Weighted fair queueing on measured time: which lane runs the next step.

Each lane has a virtual clock that advances by (seconds used / weight); the lane with the smallest one runs next
(start-time fair queueing, Goyal et al. 1996, with measured instead of announced cost).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

L = TypeVar("L")


class FairShare(Generic[L]):
    """Chooses among lanes; `weights` are relative shares of the engine's time while several lanes have work."""

    def __init__(self, weights: Mapping[L, float]) -> None:
        self._weights = dict(weights)
        self._clock = dict.fromkeys(weights, 0.0)
        self._now = 0.0

    def choose(self, busy: Iterable[L]) -> L | None:
        """The lane whose turn it is. One that was idle starts at the present: idleness earns no credit."""
        lanes = list(busy)
        if not lanes:
            return None
        for lane in lanes:
            self._clock[lane] = max(self._clock[lane], self._now)
        chosen = min(lanes, key=self._clock.__getitem__)
        self._now = self._clock[chosen]
        return chosen

    @contextmanager
    def charge(self, lane: L) -> Iterator[None]:
        """Charge the time spent inside to `lane`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._clock[lane] += (time.perf_counter() - began) / self._weights[lane]
