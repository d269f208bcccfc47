"""Making way for streams of other workers on the same device.

A lane runs its own rows by priority, and lanes of one engine share its time. Two processes on one device share that by
halves: each pass of one makes the other's longer, and no order within one process gives that back.
So a lane that has nothing as good as a neighbour's streams rests after each of its steps, for as long as makes its
share of the time small. It always goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from engine.lane import AnyLane
from stoker.contract.kinds import KINDS, TRAIN

K = TypeVar("K")

#: Of the time, how much a lane that makes way takes: next to it, fewer than one token in twenty of a stream waits for
#: a step of it.
SHARE = 1 / 50
#: Seconds that a rest lasts at most, except one of training: where a step takes long because others use the device too,
#: a share of so little would be as good as none.
LONGEST_REST = 30.0
#: Seconds for which a neighbour that ran a stream counts as one that does: between two requests it has none.
LINGER = 1.0
#: Seconds after which a lane that rests looks again.
LOOK_EVERY = 0.05


class Neighbours(Protocol):
    """Other workers that compute on this one's device. `announce` is called in the engine's thread, `is_ahead` in any;
    both at every step, so they return at once."""

    def announce(self, priority: int | None) -> None:
        """The best priority of the streams that run here; None: there are none."""
        ...

    def is_ahead(self, priority: int) -> bool:
        """Whether one of them runs a stream of a better priority."""
        ...


class MakingWay:
    """Which lanes rest. `neighbours`: None on a device of one's own. `train_share`: of the time, for training that
    makes way: what it has next to a stream of its own worker."""

    def __init__(
        self, neighbours: Neighbours | None, train_share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._neighbours, self._clock = neighbours, clock
        self._train_share = train_share
        #: The best priority of the streams that run here.
        self._own: int | None = None
        #: Priority → when a neighbour was last seen to run a stream of a better one.
        self._seen: dict[int, float] = {}
        #: Until when lanes that make way rest.
        self._until = 0.0
        self._ending = False

    def announce(self, lanes: Mapping[K, AnyLane]) -> None:
        """Let neighbours know of the streams of these lanes."""
        if self._neighbours is None:
            return
        streams = [lane for lane in lanes.values() if lane.busy and KINDS[lane.kind].urgent]
        self._own = min(map(_best, streams), default=None)
        self._neighbours.announce(self._own)

    def is_behind(self, priority: int) -> bool:
        """Whether jobs of this priority make way for a neighbour's streams: those have to be better than all streams
        that run here, which share the time with such jobs as it is. From any thread."""
        if self._neighbours is None or self._ending:
            return False
        now, own = self._clock(), self._own
        priority = priority if own is None else min(priority, own)
        if self._neighbours.is_ahead(priority):
            self._seen[priority] = now
        seen = self._seen.get(priority)
        return seen is not None and now - seen < LINGER

    def end(self) -> None:
        """No lane rests from now on: the worker stops, and its jobs have little time left. From any thread."""
        self._ending = True

    def behind(self, lanes: Mapping[K, AnyLane]) -> set[K]:
        """Those of the lanes that have work and make way."""
        if self._neighbours is None:
            return set()
        return {key for key, lane in lanes.items() if lane.busy and self.is_behind(_best(lane))}

    def note(self, kind: str, seconds: float) -> None:
        """A lane that makes way took a step of so many seconds."""
        if kind == TRAIN.name:
            rest = seconds * (1 / self._train_share - 1)
        else:
            rest = min(LONGEST_REST, seconds * (1 / SHARE - 1))
        self._until = self._clock() + rest

    @property
    def rest(self) -> float:
        """Seconds for which lanes that make way still rest."""
        return max(0.0, self._until - self._clock())


def _best(lane: AnyLane) -> int:
    """The best priority of the jobs of a lane that has some."""
    return min(work.ticket.priority for work in lane.held)
