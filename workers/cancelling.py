"""Listening for cancels: a nudge over pub/sub is fast, the durable mark is sure."""

from __future__ import annotations

import logging
import threading

from redis.exceptions import RedisError

from stoker import keys
from workers.runtime import Runtime

log = logging.getLogger(__name__)

#: Seconds between looks at the durable marks of running jobs.
SWEEP_EVERY = 1.0


class CancelWatch:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = threading.Thread(target=self._run, name="cancels", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._runtime.stopped.is_set():
            try:
                self._listen()
            except RedisError as error:
                log.warning("cancels wait for the broker: %s", error)
                self._runtime.stopped.wait(1.0)

    def _listen(self) -> None:
        with self._runtime.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(keys.CANCELS)
            while not self._runtime.stopped.is_set():
                message = pubsub.get_message(timeout=SWEEP_EVERY)
                if message is None:
                    self._runtime.cancel_if_asked()
                else:
                    self._runtime.cancel(message["data"].decode())
