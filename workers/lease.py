"""The lease: this process keeps its messages for as long as it lives, and no longer.

kombu gives a message that was not acknowledged within `visibility_timeout` to another worker. That is what brings back
the jobs of a worker that died, and what would run a long job twice; so a thread renews the score of every message that
this process holds, and the timeout can be seconds. The thread dies with the process, `kill -9` included.

After an outage of the broker every lease looks expired, the living workers' too. So a worker takes other workers'
messages only after it could renew its own for a whole lease without a gap: by then every living one has done the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from celery import bootsteps

from stoker.broker.connection import connect
from stoker.settings import Settings
from workers import clock, runtime, transport
from workers.background import Background
from workers.lanes import LaneRequest

#: Renewals in the time of one lease: one may fail, and another be late.
RENEWALS = 4


class Health:
    """Since when the broker has answered this process without a gap. Asked by kombu's sweep, in another thread."""

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock = lease, clock
        self._since: float | None = None
        self._last = 0.0

    def answered(self) -> None:
        now = self._clock()
        if self._since is None or now - self._last > self._lease / 2:
            self._since = now
        self._last = now

    def failed(self) -> None:
        self._since = None

    def may_take_over(self) -> bool:
        # A process that was itself frozen sees an old `_last` here, before its own thread has noticed.
        now = self._clock()
        fresh = now - self._last <= self._lease / 2
        return self._since is not None and fresh and now - self._since >= self._lease


class LeaseStep(bootsteps.StartStopStep):
    """Starts with the first connection, and outlives every reconnection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    settings: Settings

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._stopped = threading.Event()
        self.thread: Background | None = None
        self.redis: Any = None
        self.health = Health(self.settings.lease)
        self._consumer: Any = None

    def start(self, consumer: Any) -> None:
        """Runs at every connection: each brings a channel of its own, with the tags that it delivered."""
        self._consumer = consumer.task_consumer
        if self.thread is None:
            transport.may_take_over = self.health.may_take_over
            self.redis = connect(self.settings)
            # Two rounds: a record that cannot be read must not cost any message its lease.
            self.thread = Background(
                "lease",
                self.renew,
                self._fence,
                stopped=self._stopped,
                every=self.settings.lease / RENEWALS,
                failed=lambda: self.health.failed(),
            )
            self.thread.start()

    def stop(self, consumer: Any) -> None:
        """Does nothing: Celery calls it on every lost connection, and jobs still run while the pool drains."""

    terminate = stop

    def shutdown(self, consumer: Any) -> None:
        self._stopped.set()

    def renew(self) -> None:
        """Say of every message that this process holds that it is held still."""
        tags = self._held_tags()
        pipeline = self.redis.pipeline()
        pipeline.ping()
        if tags:
            # known: a message that was acknowledged meanwhile must not come back.
            clock.hold(pipeline, tags, known=True)
        pipeline.execute()
        self.health.answered()

    def _fence(self) -> None:
        runtime.current().fence_lost(self.redis)

    def _held_tags(self) -> set[str]:
        # Not Celery's own table of requests: it has one entry for a job, and a job may be here twice for a moment.
        running = {request.message.delivery_tag for request in list(LaneRequest.by_token.values())}
        prefetched: set[str] = self._consumer.held_tags()
        return running | prefetched
