"""How many jobs of each kind a worker holds: no more than it can run, and the rest is left to others.

Celery's threads pool has one limit for all queues. Here each kind has its own: while it is full the worker asks the
broker for no job of that kind (`workers/celery/consumer.py`), and asks again as soon as one has ended.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stoker.broker import keys
from stoker.contract import ModelCard
from stoker.contract.kinds import KINDS
from stoker.errors import WorkerUnavailable

#: Seconds after which a lane that was shrunk for want of memory tries to hold twice as many.
GROW_AFTER = 60.0
SHRINK_AFTER = 2.0


def queues_of(cards: Iterable[ModelCard]) -> dict[str, list[str]]:
    """kind → the queues that bring jobs of it to a worker with these models."""
    queues: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for card in cards:
        for kind in card.kinds:
            queues[kind].append(keys.queue(card.model, kind))
    return queues


def _nothing() -> None: ...


class DoesNotFit(WorkerUnavailable):
    """Next to the `others` of its kind that are here: the job goes back to its queue. Never leaves the process."""

    def __init__(self, why: str, others: int) -> None:
        super().__init__(why)
        self.others = others


@dataclass(frozen=True)
class _Bound:
    """No more than `most` jobs are held for now, and why."""

    most: int
    why: str


class Lanes:
    """Counts the jobs held, and says whether one more may be taken.

    A kind holds as many as its limit says, or fewer after `shrink`. `hold_back` and `narrow` bound it further: the one
    until a job has ended, the other until `widen`. `lend` lets it hold more, once.
    """

    def __init__(self) -> None:
        #: kind → jobs that it may hold by the worker's settings.
        self._limits: dict[str, int] = {}
        #: kind → jobs that it may hold now: its limit, or less after `shrink`.
        self._capacity: dict[str, int] = {}
        #: kind → what `hold_back` and `narrow` said.
        self._held_back: dict[str, _Bound] = {}
        self._narrow: dict[str, _Bound] = {}
        #: kind → when it was shrunk, or grew, last: lanes run out of memory together, and each has to hold fewer.
        self._shrunk: dict[str, float] = {}
        #: kind → the queues that bring its jobs.
        self._queues: dict[str, list[str]] = {}
        self._held: dict[str, int] = {}
        #: kind → jobs that it may hold until it has taken the next one, where that is more than its capacity.
        self._lent: dict[str, int] = {}
        self._closed = False
        self._lock = threading.Lock()
        #: Makes the consumer's loop look again, from any thread.
        self.wake: Callable[[], object] = _nothing

    def configure(self, limits: Mapping[str, int], queues: Mapping[str, list[str]]) -> None:
        self._limits, self._queues = dict(limits), {kind: list(names) for kind, names in queues.items()}
        self._capacity, self._held_back, self._narrow, self._lent = dict(limits), {}, {}, {}
        self._held = dict.fromkeys(limits, 0)

    def serve(self, queues: Mapping[str, Sequence[str]]) -> None:
        """From now on these bring jobs."""
        self._queues = {kind: list(names) for kind, names in queues.items()}

    def load(self) -> dict[str, tuple[int, int]]:
        """kind → (held, limit)."""
        return {kind: (held, held if self._closed else self._most(kind)) for kind, held in self._held.items()}

    def close(self) -> None:
        """The worker stops and takes no more jobs: from now on `load` says that there is no room. No lock: it is called
        in a signal's handler."""
        self._closed = True

    @property
    def held_back(self) -> dict[str, str]:
        """kind → why no more of it are held now than there are."""
        return {kind: bound.why for bounds in (self._narrow, self._held_back) for kind, bound in list(bounds.items())}

    def slots(self, kind: str) -> int:
        """How many jobs of a kind could be held, were it not for `narrow`."""
        held_back = self._held_back.get(kind)
        return self._capacity[kind] if held_back is None else min(self._capacity[kind], held_back.most)

    def _most(self, kind: str) -> int:
        narrow = self._narrow.get(kind)
        return self.slots(kind) if narrow is None else min(self.slots(kind), narrow.most)

    def kind_of(self, queue: str) -> str | None:
        return next((kind for kind, queues in self._queues.items() if queue in queues), None)

    def has_room(self, kind: str) -> bool:
        """Whether one more may be taken. Asked by the consumer's loop, each time before it asks the broker for one."""
        with self._lock:
            return self._held[kind] < max(self._most(kind), self._lent.get(kind, 0))

    def queues(self, kind: str) -> list[str]:
        """The queues that bring jobs of a kind."""
        return list(self._queues[kind])

    def lend(self, kind: str, held: int) -> None:
        """Let the lane take jobs until it holds so many, once: a job that is better than those here waits."""
        with self._lock:
            self._lent[kind] = held
        self.wake()

    def narrow(self, kind: str, most: int, why: str) -> None:
        """Take none beyond `most`, except what is lent, until `widen`."""
        with self._lock:
            self._narrow[kind] = _Bound(most, why)

    def widen(self, kind: str) -> None:
        """Take back what `narrow` said."""
        with self._lock:
            was_narrow = self._narrow.pop(kind, None) is not None
        if was_narrow:
            self.wake()

    def enter(self, kind: str) -> None:
        """A job was taken. Called in the consumer's thread."""
        with self._lock:
            self._held[kind] += 1
            self._lent.pop(kind, None)

    def leave(self, kind: str) -> None:
        """A job has ended. Called in any thread."""
        with self._lock:
            self._held[kind] -= 1
            left = self._most(kind) - self._held[kind]
            # More than one has left at once where they ended before the job that did not fit.
            back = left > 0 and self._held_back.pop(kind, None) is not None
            reopened = left == 1 or back
        if reopened:
            self.wake()

    def hold_back(self, kind: str, others: int, why: str) -> None:
        """A job that was taken does not fit next to `others`: hold no more than these, until one of them has ended.

        Called before that job leaves. What has ended meanwhile shows when it does.
        """
        with self._lock:
            self._held_back[kind] = _Bound(min(others, self._most(kind)), why)

    def shrink(self, kind: str) -> None:
        """The jobs of this kind did not fit into memory together: hold half as many, until `grow`.

        Each of the jobs that failed together calls this; the first call counts.
        """
        with self._lock:
            if not self._stands_since(kind, SHRINK_AFTER):
                return
            self._capacity[kind], self._shrunk[kind] = max(1, self._capacity[kind] // 2), time.monotonic()
            # Where memory ran out there is none for a job in addition either.
            self._lent.pop(kind, None)

    def grow(self) -> None:
        """Called from time to time: what was shrunk gets twice its size back, a while after the last shrinking."""
        for kind, limit in self._limits.items():
            with self._lock:
                grows = self._capacity[kind] < limit and self._stands_since(kind, GROW_AFTER)
                if grows:
                    self._capacity[kind], self._shrunk[kind] = min(limit, 2 * self._capacity[kind]), time.monotonic()
            if grows:
                self.wake()

    def _stands_since(self, kind: str, seconds: float) -> bool:
        """Whether a lane has had its size for that many seconds."""
        return time.monotonic() - self._shrunk.get(kind, -math.inf) >= seconds
