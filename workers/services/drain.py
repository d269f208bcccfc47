"""Stopping: running jobs get the grace time, then go back to the queue; nothing is lost.

Training goes back at once: it may last for hours, and nobody watches it token by token.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from redis.exceptions import RedisError

from stoker.broker.connection import connect
from stoker.contract.kinds import KINDS
from workers.capacity import Lanes
from workers.deliveries import Deliveries
from workers.ending import end_process
from workers.services.background import Background
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: The exit code of a worker that could not give its jobs back.
EX_TEMPFAIL = 75
#: Seconds between looks at a broker that may be away, and looks in a row that it may miss.
LOOK_EVERY, MISSES = 1.0, 2


def begin(runtime: Runtime, deliveries: Deliveries, lanes: Lanes) -> None:
    """Called when the worker was asked to stop (SIGTERM, SIGINT)."""
    # No other worker waits for this one, and none passes a prompt on to it.
    runtime.stopping = True
    lanes.close()
    # What was prefetched goes back to its queue at once.
    deliveries.go_back = True
    # In their grace, jobs that rested for a neighbour's streams go on.
    runtime.hurry()
    runtime.hand_back({name for name, kind in KINDS.items() if not kind.grace})
    Drain(runtime).start()
    log.info("draining: running jobs have %.0f s", runtime.settings.grace)


class Drain:
    """What happens when the grace is over. `end` ends the process."""

    def __init__(self, runtime: Runtime, redis: Any = None, end: Callable[[], object] | None = None) -> None:
        self._runtime, self._end = runtime, end or partial(end_process, EX_TEMPFAIL)
        self._redis = redis or connect(runtime.settings, timeout=LOOK_EVERY)
        self._over, self._missed = False, 0
        # Never set: the thread ends with the process, or ends it.
        self._stopped = threading.Event()

    def start(self) -> None:
        Background("drain", self._round, stopped=self._stopped, every=LOOK_EVERY).start()

    def _round(self) -> None:
        if not self._over:
            self._stopped.wait(self._runtime.settings.grace)
            self.end_of_grace()
        self.look()

    def end_of_grace(self) -> None:
        self._over = True
        self._runtime.hand_back(set(KINDS))

    def look(self) -> None:
        """A worker without a broker has nobody to hand its jobs to, and Celery would wait for one: end the process.

        Nothing is lost: no message was acknowledged, so the leases of its jobs run out and another worker takes them.
        """
        self._missed = 0 if self._answers() else self._missed + 1
        if self._missed < MISSES:
            return
        log.critical("the broker is away and the grace is over: ending without it. Leases bring the jobs elsewhere.")
        self._stopped.set()
        self._end()

    def _answers(self) -> bool:
        try:
            return bool(self._redis.ping())
        except RedisError:
            return False
