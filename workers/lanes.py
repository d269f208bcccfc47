"""Lanes: a worker takes no more jobs of a kind than it can run, and leaves the rest to others.

Celery's threads pool has one limit for all queues. Here each kind has its own: while it is full the worker asks the
broker for no job of that kind (`workers/consumer.py`), and asks again as soon as one has ended.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from celery import bootsteps
from celery.worker.request import Request
from kombu.transport.virtual.base import QoS

#: Seconds after which a lane that was shrunk for want of memory tries to hold twice as many.
GROW_AFTER = 60.0
SHRINK_AFTER = 2.0


def _nothing() -> None: ...


class Lanes:
    """Counts the jobs held, by kind. `queues`: kind → the queues that bring it."""

    def __init__(self) -> None:
        self._limits: dict[str, int] = {}
        #: kind → jobs it may hold now: its limit, or less after `shrink`.
        self._capacity: dict[str, int] = {}
        self._shrunk = -GROW_AFTER
        self._queues: dict[str, list[str]] = {}
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()
        #: Makes the consumer's loop look again, from any thread.
        self.wake: Callable[[], object] = _nothing

    def configure(self, limits: Mapping[str, int], queues: Mapping[str, list[str]]) -> None:
        self._limits, self._queues = dict(limits), {kind: list(names) for kind, names in queues.items()}
        self._capacity = dict(limits)
        self._held = dict.fromkeys(limits, 0)

    def load(self) -> dict[str, tuple[int, int]]:
        """kind → (held, limit)."""
        return {kind: (held, self._capacity[kind]) for kind, held in self._held.items()}

    def kind_of(self, queue: str) -> str | None:
        return next((kind for kind, queues in self._queues.items() if queue in queues), None)

    def has_room(self, kind: str) -> bool:
        """Whether one more may be taken. Asked by the consumer's loop, each time before it asks the broker for one."""
        with self._lock:
            return self._held[kind] < self._capacity[kind]

    def enter(self, kind: str) -> None:
        """A job was taken. Called in the consumer's thread."""
        with self._lock:
            self._held[kind] += 1

    def leave(self, kind: str) -> None:
        """A job has ended. Called in any thread."""
        with self._lock:
            self._held[kind] -= 1
            reopened = self._held[kind] == self._capacity[kind] - 1
        if reopened:
            self.wake()

    def shrink(self, kind: str) -> None:
        """The jobs of this kind did not fit into memory together: hold half as many, until `grow`.

        Each of the jobs that failed together says so; once counts.
        """
        with self._lock:
            if time.monotonic() - self._shrunk < SHRINK_AFTER:
                return
            self._capacity[kind], self._shrunk = max(1, self._capacity[kind] // 2), time.monotonic()

    def grow(self) -> None:
        """Called from time to time: what was shrunk gets twice its size back, a while after the last shrinking."""
        if time.monotonic() - self._shrunk < GROW_AFTER:
            return
        for kind, limit in self._limits.items():
            with self._lock:
                grows = self._capacity[kind] < limit
                if grows:
                    self._capacity[kind], self._shrunk = min(limit, 2 * self._capacity[kind]), time.monotonic()
            if grows:
                self.wake()


#: One process, one worker, one set of lanes: Celery makes requests and steps by class, so they meet here.
lanes = Lanes()


class LaneStep(bootsteps.StartStopStep):
    """Lets the lanes wake the consumer's loop when they have room again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        lanes.wake = partial(consumer.call_soon, _nothing)


class LaneRequest(Request):
    """A request that holds a slot in its kind's lane from the moment it is taken until it is acked or rejected.

    `terminate` (Flower's button, `celery control revoke --terminate`) asks the engine to stop the job: the threads
    pool itself cannot end one.
    """

    #: Deliveries that this process holds.
    by_token: ClassVar[dict[str, LaneRequest]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kind = self.name.removeprefix("stoker.")
        self._held = True
        #: Names this delivery, and no other of the same job: what the job's record calls its owner by.
        self.token = uuid.uuid4().hex
        self._request_dict |= {"stoker_token": self.token, "stoker_tag": self.message.delivery_tag}
        self.by_token[self.token] = self
        lanes.enter(self._kind)

    def fence(self) -> None:
        """The message belongs to another worker now, under the same delivery tag: an ack from here would take it away
        from there. From now on this request only forgets it."""
        self._on_ack = self._on_reject = self._forget

    def _forget(self, *_: Any) -> None:
        # A frozen worker may get its own message again, and then holds the tag twice: the newer delivery needs it.
        tag = self.message.delivery_tag
        if any(other is not self and other.message.delivery_tag == tag for other in list(self.by_token.values())):
            return
        QoS.ack(self.message.channel.qos, tag)  # type: ignore[no-untyped-call]

    def acknowledge(self) -> None:
        super().acknowledge()
        self._leave()

    def reject(self, requeue: bool = False) -> None:
        super().reject(requeue=requeue)
        self._leave()

    def terminate(self, pool: Any, signal: str | None = None) -> None:
        from workers.runtime import current

        current().cancel(self.id)

    @classmethod
    def drop(cls, tag: str) -> bool:
        """Give up the delivery with this tag, the newest if there are two, which failed before its job began: its
        message is done with, and its slot is free. Return whether there is one."""
        held = [request for request in list(cls.by_token.values()) if request.message.delivery_tag == tag]
        if held:
            held[-1].reject()
        return bool(held)

    def _leave(self) -> None:
        if self._held:
            self._held = False
            self.by_token.pop(self.token, None)
            lanes.leave(self._kind)
