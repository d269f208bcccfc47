"""Weighted fair queueing on measured time: which lane runs the next step.

Each lane has a virtual clock that advances by (seconds used / weight); the lane with the smallest one runs next
(start-time fair queueing, Goyal et al. 1996, with measured instead of announced cost).

Urgent lanes, whose jobs are streams, do not wait for long: when others have used `stall` seconds since an urgent lane
that has work last ran, it runs next, and pays for its time like any other. A single step of another lane can be longer
than `stall`; it is never broken off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

from stoker.contract.kinds import GENERATE, KINDS

L = TypeVar("L")


class FairShare(Generic[L]):
    """Chooses among lanes; `weights` are relative shares of the engine's time while several lanes have work."""

    def __init__(self, weights: Mapping[L, float], urgent: Collection[L] = (), stall: float = math.inf) -> None:
        self._weights = dict(weights)
        self._clock = dict.fromkeys(weights, 0.0)
        self._now = 0.0
        self._stall = stall
        #: Urgent lane → seconds that others used since it last ran or was idle.
        self._stalled = dict.fromkeys(urgent, 0.0)

    def add(self, lane: L, weight: float, *, urgent: bool) -> None:
        """Another lane, which starts at the present."""
        self._weights[lane], self._clock[lane] = weight, self._now
        if urgent:
            self._stalled[lane] = 0.0

    def remove(self, lane: L) -> None:
        """A lane that has no work any more."""
        del self._weights[lane], self._clock[lane]
        self._stalled.pop(lane, None)

    def choose(self, busy: Iterable[L]) -> L | None:
        """The lane whose turn it is. One that was idle starts at the present: idleness earns no credit."""
        lanes = list(busy)
        for idle in self._stalled.keys() - set(lanes):
            self._stalled[idle] = 0.0
        if not lanes:
            return None
        for lane in lanes:
            self._clock[lane] = max(self._clock[lane], self._now)
        chosen = min(lanes, key=self._clock.__getitem__)
        self._now = self._clock[chosen]
        late = [lane for lane in lanes if self._stalled.get(lane, 0.0) >= self._stall]
        return min(late, key=self._clock.__getitem__) if late else chosen

    @contextmanager
    def charge(self, lane: L) -> Iterator[None]:
        """Charge the time spent inside to `lane`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._clock[lane] += seconds / self._weights[lane]
            for urgent in self._stalled:
                self._stalled[urgent] = 0.0 if urgent == lane else self._stalled[urgent] + seconds


def weights_by_kind(train_share: float) -> dict[str, float]:
    """Shares of the time while several lanes have work, by kind; `train_share`: of the time, while generation waits."""
    trains = (GENERATE.weight or 0.0) * train_share / (1.0 - train_share)
    return {name: trains if kind.weight is None else kind.weight for name, kind in KINDS.items()}
