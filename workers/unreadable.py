"""Messages that cannot be read: a dead letter each, with their bytes, and nothing more comes of them.

kombu's thread only hands them over. It must not wait for the broker, and a broker that takes nothing must not stop it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import re
from dataclasses import dataclass
from typing import Any

from stoker.broker import keys, letters
from workers import clock

log = logging.getLogger(__name__)

#: Letters of messages that the broker keeps. What comes beyond them is in the log alone: a client that has gone wrong
#: may send millions.
MOST = 1000
#: Messages that may wait for a broker that takes nothing.
WAITING = 1000
_TAG = re.compile(rb'"delivery_tag": *"[^"]*"|"redelivered": *true,? *')


@dataclass(frozen=True)
class Unreadable:
    """`trouble`: why it could not be read. `queue`: where it came from."""

    raw: bytes
    queue: str
    trouble: str

    @property
    def id(self) -> str:
        """The dead letter's id. A message that is sent again keeps it: the delivery tag, which changes, is left out."""
        return f"message-{hashlib.sha256(_TAG.sub(b'', self.raw)).hexdigest()[:16]}"

    def letter(self, worker: str, now: float) -> str:
        """The dead letter in the form that the ledger writes for jobs, with the message's bytes."""
        history = [{"worker": worker, "time": now, "trouble": self.trouble}]
        fields = {"kind": letters.MESSAGE, "model": self.queue, "request": "", "client": "", "history": history}
        return json.dumps(fields | letters.shown(self.raw))


class DeadMessages:
    """`add` is called in kombu's thread, `write` by a thread of its own."""

    def __init__(self, redis: Any, worker: str) -> None:
        self._redis, self._worker = redis, worker
        self._queue: queue.Queue[Unreadable] = queue.Queue(WAITING)
        self._unwritten: Unreadable | None = None

    def add(self, message: Unreadable) -> None:
        # Neither its bytes nor what is wrong with them, which quotes them: they may be any client's text.
        log.error("a message of %s cannot be read; `stoker jobs dead` shows it: %s", message.queue, message.id)
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            size = len(message.raw)
            log.critical("no room for the dead letter %s of %d bytes: the broker takes none", message.id, size)

    def write(self, wait: float = 1.0) -> None:
        """Write what was added; wait a moment for the first. What the broker does not take waits for the next call."""
        try:
            while True:
                if self._unwritten is None:
                    self._unwritten = self._queue.get(timeout=wait)
                self._store(self._unwritten)
                self._unwritten, wait = None, 0.0
        except queue.Empty:
            return

    def _store(self, message: Unreadable) -> None:
        if self._redis.hlen(keys.DEAD) >= MOST and not self._redis.hexists(keys.DEAD, message.id):
            size = len(message.raw)
            log.error("%d dead letters are there already: %s of %d bytes is not kept", MOST, message.id, size)
            return
        pipeline = self._redis.pipeline()
        pipeline.hset(keys.DEAD, message.id, message.letter(self._worker, clock.now(self._redis)))
        pipeline.expire(keys.DEAD, keys.DEAD_TTL)
        pipeline.execute()
