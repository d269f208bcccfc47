"""What the tasks of this process share: the engine, the publisher, and the jobs that run now."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from stoker import keys
from stoker.connection import TROUBLE, connect
from stoker.errors import WorkerUnavailable
from stoker.settings import Settings
from workers.publishing import Publisher

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.ticket import Ticket

log = logging.getLogger(__name__)
T = TypeVar("T")


class Runtime:
    """Made by the boot step before the pool starts; tasks get it from `current()`."""

    def __init__(self, settings: Settings, name: str, make_engine: Callable[[Callable[..., None]], Engine]) -> None:
        self.settings, self.name = settings, name
        self.redis = connect(settings)
        self.publisher = Publisher(connect(settings))
        self.engine = make_engine(self.publisher.publish)
        self.started = time.time()
        self._running: dict[str, Ticket] = {}
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def start(self) -> None:
        """Load the models. Raises `ModelError`, and then nothing has been started."""
        self.engine.start()
        self.publisher.start()

    def stop(self) -> None:
        """Called when the pool has drained. Side threads see `stopped` and end with the process."""
        self.stopped.set()
        self.engine.stop()
        self.publisher.stop()

    @contextmanager
    def running(self, ticket: Ticket) -> Iterator[None]:
        """Let `cancel` and `hand_back` find the ticket while the job runs."""
        with self._lock:
            self._running[ticket.job_id] = ticket
        try:
            yield
        finally:
            with self._lock:
                del self._running[ticket.job_id]

    def cancel(self, job_id: str) -> bool:
        """Stop a job of this worker at the engine's next step; False if it does not run here."""
        ticket = self._running.get(job_id)
        if ticket is None:
            return False
        ticket.cancel()
        self.engine.wake()
        return True

    def cancel_if_asked(self, job_ids: list[str] | None = None) -> None:
        """Look for the durable mark of a cancel: the nudge over pub/sub may have come too early, or never."""
        ids = list(self._running) if job_ids is None else job_ids
        if ids:
            marks = self.redis.mget([keys.cancel(job_id) for job_id in ids])
            for job_id, mark in zip(ids, marks, strict=True):
                if mark is not None:
                    self.cancel(job_id)

    def hand_back(self, kinds: set[str]) -> None:
        """Stop running jobs of these kinds, so that their messages go back to the queue."""
        with self._lock:
            tickets = [ticket for ticket in self._running.values() if ticket.kind in kinds]
        for ticket in tickets:
            ticket.cancel(WorkerUnavailable("the worker is stopping. The job goes to another one."))
        self.engine.wake()

    def persist(self, action: Callable[[], T]) -> T:
        """Do something with the broker, however long it is away. For what must not be lost."""
        pause = 0.1
        while True:
            try:
                return action()
            except TROUBLE as error:
                if self.stopped.wait(pause):
                    raise
                log.warning("the broker is away (%s); trying again", error)
                pause = min(2.0, pause * 2)


_current: Runtime | None = None


def install(runtime: Runtime | None) -> None:
    global _current
    _current = runtime


def current() -> Runtime:
    if _current is None:
        raise WorkerUnavailable("this process has no engine: start workers with `stoker worker`.")
    return _current
