"""The lease: this process keeps its messages for as long as it lives, and no longer.

kombu gives a message that was not acknowledged within `visibility_timeout` to somebody else. That is what brings back
the jobs of a worker that died, and what would run a long job twice; so a thread renews the score of every message that
this process holds, and the timeout can be seconds. The thread dies with the process, `kill -9` included.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery import bootsteps
from celery.worker import state
from redis.exceptions import RedisError

from stoker import keys
from stoker.connection import connect
from stoker.settings import Settings

log = logging.getLogger(__name__)


class LeaseStep(bootsteps.StartStopStep):
    """Starts with the first connection, and outlives every reconnection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    settings: Settings

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._qos: Any = None

    def start(self, consumer: Any) -> None:
        """Runs at every connection: each brings a channel of its own, with the tags that it delivered."""
        self._qos = consumer.task_consumer.channel.qos
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
            self._thread.start()

    def stop(self, consumer: Any) -> None:
        """Not here: this is called on every lost connection, and while the pool drains jobs still run."""

    terminate = stop

    def shutdown(self, consumer: Any) -> None:
        self._stopped.set()

    def _run(self) -> None:
        redis = connect(self.settings)
        while not self._stopped.wait(self.settings.lease / 4):
            try:
                self._renew(redis)
            except RedisError as error:
                log.debug("the lease could not be renewed: %s", error)

    def _renew(self, redis: Any) -> None:
        tags = self._held_tags()
        if tags:
            now = time.time()
            # xx: a message that was acknowledged meanwhile must not come back.
            redis.zadd(f"{keys.PREFIX}unacked_index", dict.fromkeys(tags, now), xx=True)

    def _held_tags(self) -> set[str]:
        running = {r.message.delivery_tag for r in list(state.requests.values()) if not r.acknowledged}
        prefetched = {tag for tag in list(self._qos._delivered) if tag not in self._qos._dirty}
        return running | prefetched
