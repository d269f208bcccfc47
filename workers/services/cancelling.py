"""Listening for cancels: a nudge over pub/sub is fast, the durable mark is sure."""

from __future__ import annotations

from typing import Any

from stoker.broker import keys
from workers.services.background import Background
from workers.services.runtime import Runtime

#: Seconds between looks at the durable marks of running jobs, and before the next try at a broker that is away.
SWEEP_EVERY = 1.0


class CancelWatch:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
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
        """A nudge names a job; after a second without one the marks are looked at."""
        if message is None:
            self._runtime.cancel_if_asked()
        else:
            # Bytes that are no text name no job.
            self._runtime.cancel(message["data"].decode(errors="replace"))
