"""The deliveries that this process holds, and what its channels do with those that no job comes of."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Protocol

from workers.unreadable import DeadMessages, Unreadable

log = logging.getLogger(__name__)


class Health:
    """Since when the broker has answered this process without a gap. Asked by kombu's sweep, in another thread."""

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock = lease, clock
        self._since: float | None = None
        self._last = 0.0
        #: Rounds of the lease's thread that were answered, and that failed.
        self.renewals = self.failures = 0

    def answered(self) -> None:
        now = self._clock()
        self.renewals += 1
        if self._since is None or now - self._last > self._lease / 2:
            self._since = now
        self._last = now

    def failed(self) -> None:
        self.failures += 1
        self._since = None

    def may_take_over(self) -> bool:
        # A process that was itself frozen sees an old `_last` here, before its own thread has noticed.
        now = self._clock()
        fresh = now - self._last <= self._lease / 2
        return self._since is not None and fresh and now - self._since >= self._lease


class HeldDelivery(Protocol):
    """One delivery of one message, neither acknowledged nor given back: a `LaneRequest`."""

    #: Names this delivery, and no other of the same job.
    token: str

    @property
    def tag(self) -> str:
        """kombu's name of the message that is held."""
        ...

    @property
    def queue(self) -> str:
        """Where its message came from."""
        ...

    def fence(self) -> None: ...

    def reject(self, requeue: bool = False) -> None: ...


class Deliveries:
    """One for each worker process. Channels ask it, in the consumer's thread; requests enter and leave in any."""

    def __init__(self, health: Health, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Whether this process may give other workers' expired messages back to the queue.
        self.health = health
        #: Whether a closing channel requeues what was not acknowledged. Off while the worker runs: its lease keeps it.
        self.go_back = False
        self._held: dict[str, HeldDelivery] = {}
        #: Queue → when a delivery of it came or ended last.
        self._last: dict[str, float] = {}
        self._dead: DeadMessages | None = None
        #: Moves aside what another program wrote into shared keys; returns whether there was anything.
        self.mend: Callable[[], bool] = lambda: False

    def add(self, delivery: HeldDelivery) -> None:
        self._held[delivery.token] = delivery
        self._last[delivery.queue] = self._clock()

    def remove(self, delivery: HeldDelivery) -> bool:
        """Whether it was there: false for all that remove it again."""
        self._last[delivery.queue] = self._clock()
        return self._held.pop(delivery.token, None) is not None

    def held_of(self, queues: Collection[str]) -> int:
        """Jobs of these queues that are here."""
        return sum(delivery.queue in queues for delivery in list(self._held.values()))

    def last_of(self, queues: Collection[str]) -> float:
        """When a job of these queues came or ended last, by the clock; 0: none did."""
        return max((self._last.get(queue, 0.0) for queue in queues), default=0.0)

    def tags(self) -> set[str]:
        """Not from Celery's own table of requests: it has one entry for a job, and a job may be here twice."""
        return {delivery.tag for delivery in list(self._held.values())}

    def fence(self, token: str) -> None:
        """The delivery of this token ends without a trace: neither result nor ack."""
        delivery = self._held.get(token)
        if delivery is not None:
            delivery.fence()

    def another_holds(self, tag: str, than: HeldDelivery) -> bool:
        """Whether another delivery here has this tag: a worker that was frozen may get its own message again."""
        return any(other is not than and other.tag == tag for other in list(self._held.values()))

    def drop(self, tag: str) -> bool:
        """Give up the delivery with this tag, the newest if there are two, which failed before its job began: its
        message is done with, and its slot is free. Return whether there is one."""
        held = [delivery for delivery in list(self._held.values()) if delivery.tag == tag]
        if held:
            held[-1].reject()
        return bool(held)

    def keep_dead(self, messages: DeadMessages) -> None:
        """From now on a message that cannot be read becomes a dead letter."""
        self._dead = messages

    def dead_letter(self, message: Unreadable) -> None:
        if self._dead is None:
            log.error("a message of %s cannot be read", message.queue)
        else:
            self._dead.add(message)
