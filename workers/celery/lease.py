"""The lease: this process keeps its messages for as long as it lives, and no longer.

kombu gives a message that was not acknowledged within `visibility_timeout` to another worker. That is what brings back
the jobs of a worker that died, and what would run a long job twice; so a thread renews the score of every message that
this process holds, and the timeout can be seconds. The thread dies with the process, `kill -9` included.

After an outage of the broker every lease looks expired, the living workers' too. So a worker takes other workers'
messages only after it could renew its own for a whole lease without a gap: by then every living one has done the same.
"""

from __future__ import annotations

import threading
from typing import Any

from celery import bootsteps

from stoker.broker.connection import connect
from workers import clock
from workers.context import WorkerContext
from workers.services.background import Background

#: Renewals in the time of one lease: one may fail, and another be late.
RENEWALS = 4


class LeaseStep(bootsteps.StartStopStep):
    """Starts with the first connection, and outlives every reconnection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._context: WorkerContext = consumer.app.context
        self._stopped = threading.Event()
        self.thread: Background | None = None
        self.redis: Any = None
        self._consumer: Any = None

    def start(self, consumer: Any) -> None:
        """Runs at every connection: each brings a channel of its own, with the tags that it delivered."""
        self._consumer = consumer.task_consumer
        if self.thread is None:
            settings, deliveries = self._context.settings, self._context.deliveries
            self.redis = connect(settings)
            # Two rounds: a record that cannot be read must not cost any message its lease.
            self.thread = Background(
                "lease",
                self.renew,
                self._fence,
                stopped=self._stopped,
                every=settings.lease / RENEWALS,
                failed=deliveries.health.failed,
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
            # Of those alone that are held: a message that was acknowledged meanwhile must not come back.
            clock.renew(pipeline, tags)
        pipeline.execute()
        self._context.deliveries.health.answered()

    def _fence(self) -> None:
        self._context.runtime.fence_lost(self.redis)

    def _held_tags(self) -> set[str]:
        prefetched: set[str] = self._consumer.held_tags()
        return self._context.deliveries.tags() | prefetched
