"""Reports to clients what this worker serves, every two seconds, for as long as it does. Times are the broker's."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from stoker.broker import keys
from stoker.contract import Presence
from stoker.contract.presence import PrefixState
from workers import clock
from workers.capacity import Lanes
from workers.services.background import Background
from workers.services.janitor import Janitor
from workers.services.keeper import Residency
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)


class Heart:
    """Writes the worker's `Presence` and the cards of its models, and lets the janitor do its round."""

    def __init__(self, runtime: Runtime, lanes: Lanes, janitor: Janitor) -> None:
        self._runtime, self._lanes = runtime, lanes
        #: What else it says of its models.
        self.residency: Callable[[], Residency] = Residency
        #: What it says of pinned prefixes.
        self.prefixes: Callable[[], tuple[PrefixState, ...]] = tuple
        self._lock, self._left = threading.Lock(), False
        rounds = (self.beat, lanes.grow, janitor.round)
        self.thread = Background("presence", *rounds, stopped=runtime.stopped, every=keys.PRESENCE_EVERY)

    def start(self) -> None:
        self.thread.start()

    def say_goodbye(self) -> None:
        """Take the presence away at once, so that nobody counts on a worker that has stopped. No beat follows."""
        with self._lock:
            self._left = True
        try:
            self._runtime.redis.delete(keys.worker(self._runtime.name))
            self._runtime.redis.zrem(keys.WORKERS, self._runtime.name)
        except RedisError as error:
            log.info("no goodbye: %s. The presence expires in %d s.", error, keys.PRESENCE_TTL)

    def beat(self) -> None:
        """Say what is warm here. Called by other threads too."""
        with self._lock:
            if not self._left:
                self._say()

    def _say(self) -> None:
        presence = self._presence(clock.now(self._runtime.redis))
        pipeline = self._runtime.redis.pipeline()
        pipeline.set(keys.worker(presence.worker), presence.model_dump_json(), ex=keys.PRESENCE_TTL)
        pipeline.zadd(keys.WORKERS, {presence.worker: presence.time})
        pipeline.zremrangebyscore(keys.WORKERS, 0, presence.time - keys.RESULT_TTL)
        pipeline.expire(keys.WORKERS, keys.MODEL_TTL)
        for card in (*presence.models, *presence.offers):
            seen = card.model_copy(update={"seen": presence.time})
            pipeline.hset(keys.MODELS, f"{card.model}/{card.contract}", seen.model_dump_json())
        pipeline.expire(keys.MODELS, keys.MODEL_TTL)
        pipeline.execute()

    def _presence(self, now: float) -> Presence:
        engine, residency = self._runtime.engine, self.residency()
        return Presence(
            worker=self._runtime.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=engine.device,
            started=now - (time.monotonic() - self._runtime.started),
            time=now,
            models=tuple(engine.cards),
            adapters=engine.adapters,
            lanes=self._lanes.load(),
            held_back=self._lanes.held_back,
            memory_bytes=engine.memory_bytes,
            offers=residency.offers,
            states=residency.states,
            prefixes=self.prefixes(),
            model_limit=residency.limit,
            ranks=engine.ranks,
            stopping=self._runtime.stopping,
        )
