"""Publishing what running jobs make: to each job's Redis Stream and to its channel, from one side thread."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from stoker import keys

if TYPE_CHECKING:
    from engine.ticket import Entry

log = logging.getLogger(__name__)

#: Steps that may wait for a broker that is slow or away; then the engine waits too, so that memory stays bounded.
BACKLOG = 4096
#: The stream's expiry is renewed once in so many entries: one command less in almost every step.
RENEW_EVERY = 64
#: Entries that one script publishes: after an outage many wait, and a script holds up everybody else.
BATCH = 512
_PUBLISH = Path(__file__).with_name("publish.lua").read_text()


class Publisher:
    """`publish` is called from the engine's thread and only queues. Order is kept; nothing is dropped."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._queue: queue.Queue[list[Entry] | threading.Event | None] = queue.Queue(BACKLOG)
        #: Entries that are not in the broker yet: without any, nobody has to wait for the thread's turn.
        self._unsent = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send what is queued, unless the broker is away, and end."""
        self._stopping.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(5)
        self._redis.close()

    def publish(self, entries: list[Entry]) -> None:
        with self._lock:
            self._unsent += len(entries)
        self._queue.put(entries)

    def flush(self) -> None:
        """Wait until everything that was published before is in the broker."""
        with self._lock:
            if not self._unsent:
                return
        sent = threading.Event()
        self._queue.put(sent)
        while not sent.wait(0.5):
            if not self._thread.is_alive():
                raise RuntimeError("the publisher has ended")

    def _run(self) -> None:
        while True:
            entries, waiters, last = self._collect()
            for start in range(0, len(entries), BATCH):
                self._send_until_sent(entries[start : start + BATCH])
            with self._lock:
                self._unsent -= len(entries)
            for waiter in waiters:
                waiter.set()
            if last:
                return

    def _collect(self) -> tuple[list[Entry], list[threading.Event], bool]:
        """Everything that is queued, as one batch."""
        entries: list[Entry] = []
        waiters: list[threading.Event] = []
        item = self._queue.get()
        while True:
            if item is None:
                return entries, waiters, True
            if isinstance(item, threading.Event):
                waiters.append(item)
            else:
                entries.extend(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return entries, waiters, False

    def _send_until_sent(self, entries: list[Entry]) -> None:
        """Sending again is safe: Redis refuses an entry id that it has, and readers drop an index that they had."""
        pause = 0.05
        while True:
            try:
                return self._send(entries)
            except RedisError as error:
                log.warning("publishing waits for the broker: %s", error)
                if self._stopping.wait(pause):
                    return
                pause = min(2.0, pause * 2)

    def _send(self, entries: list[Entry]) -> None:
        names: list[str] = []
        arguments: list[Any] = [keys.RESULT_TTL]
        for job_id, entry in entries:
            renews = entry.is_last or entry.index % RENEW_EVERY == 0
            names += (keys.stream(job_id), keys.channel(job_id))
            arguments += (keys.entry_id(entry.index), entry.model_dump_json(), int(renews))
        self._redis.eval(_PUBLISH, len(names), *names, *arguments)
