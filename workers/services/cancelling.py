"""Listening for cancels: a nudge over pub/sub is fast, the durable mark is sure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from stoker.broker import keys
from workers.services.background import Background
from workers.services.runtime import Runtime

#: Seconds between looks at the durable marks of running jobs, and before the next try at a broker that is away.
SWEEP_EVERY = 1.0


class CancelWatch:
    def __init__(self, runtime: Runtime, clock: Callable[[], float] = time.monotonic) -> None:
        self._runtime, self._clock = runtime, clock
        #: When the marks were looked at last, by the clock.
        self._looked = clock()
        self._thread = Background("cancels", self._listen, stopped=runtime.stopped, every=SWEEP_EVERY)

    def start(self) -> None:
        self._thread.start()

    def _listen(self) -> None:
        """Until the worker stops, or the connection is lost."""
        with self._runtime.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(keys.CANCELS)
            while not self._runtime.stopped.is_set():
                self.hear(pubsub.get_message(timeout=SWEEP_EVERY))

    def hear(self, message: Any) -> None:
        """A nudge names a job; after a second the marks are looked at, also where other nudges came all the time."""
        if message is not None:
            # Bytes that are no text name no job.
            self._runtime.cancel(message["data"].decode(errors="replace"))
        if message is None or self._clock() - self._looked >= SWEEP_EVERY:
            self._looked = self._clock()
            self._runtime.cancel_if_asked()
