"""The engine of a worker process, its ways to the broker, and the jobs that run now."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import RedisError, ResponseError

from stoker.broker import keys
from stoker.broker.connection import connect, passes, translated
from stoker.broker.ledger import record
from stoker.broker.ledger.transitions import LIBRARY
from stoker.broker.trouble import forbids
from stoker.broker.wrong_types import is_wrong_type
from stoker.errors import StokerError, WorkerUnavailable
from stoker.monitor.metrics import PUBLISH_LAG
from stoker.monitor.numbers import Numbers
from stoker.settings import Settings
from workers.services.engine_meter import EngineMeter
from workers.services.job_meter import JobMeter
from workers.services.mending import Mender
from workers.services.observing import observers
from workers.services.placing import Placing
from workers.services.publishing import Publisher
from workers.services.retrying import Retry

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.ticket import Ticket

log = logging.getLogger(__name__)
T = TypeVar("T")
#: Tries after a refusal for a wrong type in which this worker finds nothing wrong: another one has mended it a moment
#: before. A few, because the job's own key may be what is wrong.
AGAIN = 3


class Fenced(WorkerUnavailable):
    """The job's message was given to another worker while this one was silent. Never leaves the process."""


class Runtime:
    """Made by the boot step before the pool starts; tasks get it from the `WorkerContext`."""

    def __init__(self, settings: Settings, name: str, make_engine: Callable[[Callable[..., None]], Engine]) -> None:
        self.settings, self.name = settings, name
        self.redis = connect(settings, loads_functions=True)
        self.mender = Mender(self.redis, lambda: self.queues, name)
        self.numbers = Numbers()
        self.job_meter = JobMeter(self.numbers, lambda: self._models)
        self.publisher = Publisher(connect(settings), self.fail, self.numbers.of(PUBLISH_LAG))
        self.engine = make_engine(self.publisher.publish)
        self.placing = Placing(settings, name, self.redis)
        #: Who observes the jobs that run here.
        self.observers = observers(settings, name, self.job_meter)
        self.engine.observe = EngineMeter(self.numbers, self.job_meter.submitted).step
        #: By `time.monotonic`.
        self.started = time.monotonic()
        #: Whether the worker was asked to stop: it takes no more jobs.
        self.stopping = False
        self.stopped = threading.Event()
        #: Owner's token → its ticket: two deliveries of one job may be here for a moment.
        self._running: dict[str, Ticket[Any]] = {}
        #: Kinds whose jobs are given back from now on.
        self._given_back: set[str] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load the models, and the ledger's functions into the broker, which is waited for: where both start with their
        machine, either may be first. Raises `ModelError`, and then nothing has been started."""
        self.engine.start()
        with translated(self.settings):
            self.persist(lambda: LIBRARY.offer(self.redis))
        self.publisher.start()
        self.placing.start(self.stopped)
        self.job_meter.expect(self.engine.cards)

    def stop(self) -> None:
        """Called when the pool has drained. Side threads see `stopped` and end with the process."""
        self.stopped.set()
        self.engine.stop()
        self.publisher.stop()
        self.placing.stop()
        self.observers.close()

    @contextmanager
    def running(self, token: str, ticket: Ticket[Any]) -> Iterator[None]:
        """Let `cancel`, `hand_back` and `fence_lost` find the ticket while the job runs. An error that ends the waiting
        for it stops the job: nobody would take its result."""
        with self._lock:
            self._running[token] = ticket
            given_back = ticket.kind in self._given_back
        try:
            if given_back:
                # It was still being loaded when its kind was given back.
                self._give_back([ticket])
            yield
        except BaseException:
            if not ticket.done:
                ticket.cancel()
                self.engine.wake()
            raise
        finally:
            with self._lock:
                del self._running[token]

    def _tickets(self) -> list[tuple[str, Ticket[Any]]]:
        with self._lock:
            return list(self._running.items())

    @property
    def queues(self) -> list[str]:
        """The queues of the jobs that the models here can run."""
        return [keys.queue(card.model, kind) for card in self.engine.cards for kind in card.kinds]

    @property
    def _models(self) -> frozenset[str]:
        return frozenset(self.engine.models)

    @property
    def jobs(self) -> list[str]:
        """Ids of the jobs that run here."""
        return [ticket.job_id for _, ticket in self._tickets()]

    def priorities(self, kind: str) -> list[int]:
        """Those of the jobs of a kind that run here."""
        return [ticket.priority for _, ticket in self._tickets() if ticket.kind == kind]

    def cancel(self, job_id: str) -> None:
        """Stop a job at the engine's next step, if it runs here."""
        self._stop(job_id, None)

    def fail(self, job_id: str, error: StokerError) -> None:
        """Stop a job at the engine's next step, if it runs here; it ends with `error`."""
        self._stop(job_id, error)

    def _stop(self, job_id: str, reason: StokerError | None) -> None:
        for _, ticket in self._tickets():
            if ticket.job_id == job_id:
                ticket.cancel(reason)
        self.engine.wake()

    def cancel_if_asked(self) -> None:
        """Look for the durable marks of cancels: the nudge over pub/sub may have come too early, or never."""
        ids = [ticket.job_id for _, ticket in self._tickets()]
        if ids:
            marks = self.redis.mget([keys.cancel(job_id) for job_id in ids])
            for job_id, mark in zip(ids, marks, strict=True):
                if mark is not None:
                    self.cancel(job_id)

    def hand_back(self, kinds: set[str]) -> None:
        """Stop jobs of these kinds, so that their messages go back to the queue: those that run here, and each that
        comes to run from now on."""
        with self._lock:
            self._given_back |= kinds
            tickets = [ticket for ticket in self._running.values() if ticket.kind in kinds]
        self._give_back(tickets)

    def _give_back(self, tickets: list[Ticket[Any]]) -> None:
        for ticket in tickets:
            ticket.cancel(WorkerUnavailable("the worker is stopping. The job goes to another one."))
        self.engine.wake()

    def makes_way(self, priority: int) -> bool:
        """Whether jobs of this priority rest here for streams of other workers on the device."""
        return self.engine.makes_way(priority)

    def hurry(self) -> None:
        """No job rests for others from now on."""
        self.engine.hurry()

    def fence_lost(self, redis: Any) -> None:
        """Stop every running job whose record names another owner. A record that cannot be read names none."""
        running, pipeline = self._tickets(), redis.pipeline()
        asked = [record.owner(ticket.job_id) for _, ticket in running]
        for call in asked:
            call.send(pipeline)
        replies = pipeline.execute(raise_on_error=False)
        for (token, ticket), call, reply in zip(running, asked, replies, strict=True):
            if call.parse(reply) not in (None, token) and not ticket.stopping:
                log.warning("job %s was given to another worker while this one was silent", ticket.job_id)
                ticket.cancel(Fenced(f"job {ticket.job_id} runs elsewhere."))
                self.engine.wake()

    def persist(self, action: Callable[[], T]) -> T:
        """Do something with the broker, however long it is away, and again once a shared key of a wrong type was moved
        aside. For what must not be lost."""
        retry, again = Retry(), repeat(True, AGAIN)
        while True:
            try:
                return action()
            except RedisError as error:
                if _may_be_mended(error) and (self.mender.round() or (is_wrong_type(error) and next(again, False))):
                    continue
                pause = retry.pause(error)
                if pause is None or self.stopped.wait(pause):
                    raise
                log.warning("the broker is away (%s); trying again", error)


def _may_be_mended(error: RedisError) -> bool:
    """Whether the broker answers, and refuses for what it holds."""
    return isinstance(error, ResponseError) and not passes(error) and not forbids(error)
