"""The walk of every job, one way: claim, prepare, load its input, submit, wait, publish, finish, complete.

What ends it early is in `workers/job_errors.py`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from celery import Task, shared_task

from engine.generation.beyond import BeyondMemory
from stoker.broker import ledger
from stoker.broker.ledger.replies import Claim
from stoker.contract import GenerateRequest, Usage, encode
from stoker.contract.base import Message
from stoker.contract.codec import read
from stoker.contract.kinds import of_request
from stoker.contract.presence import node_of
from stoker.contract.requests import JobRequest
from stoker.errors import DeadlineExceeded, InvalidRequest, StokerError
from workers.delivery import Delivery
from workers.job_errors import accounted, answering_celery, recording_errors
from workers.job_lease import JobLease, PassedOn
from workers.services.placing import Memory

if TYPE_CHECKING:
    from engine.ticket import Ticket

#: Seconds between a running job's events of progress.
PROGRESS_EVERY = 2.0
Q = TypeVar("Q", bound=JobRequest)
D = TypeVar("D")
R = TypeVar("R")
RequestT = TypeVar("RequestT", contravariant=True)
DataT = TypeVar("DataT", contravariant=True)


class Submit(Protocol[RequestT, DataT, R]):
    """`Engine.submit` for one kind of job: which input belongs to its request, and what the engine makes of both."""

    def __call__(self, job_id: str, request: RequestT, data: DataT, /, *, deadline: float | None) -> Ticket[R]: ...


class JobHandler(ABC, Generic[Q, D, R]):
    """What a worker does for one kind of job, around the engine: its methods run in this order.

    `Q`: the request. `D`: what the engine needs in addition. `R`: what it makes of both. A method that the broker's
    absence breaks off is called again; only `finish` is not: it has `persist` for that.
    """

    request: type[Q]

    def prepare(self, job: Job, request: Q) -> Q:
        """The request with what only the worker knows."""
        return request

    @abstractmethod
    def load_input(self, job: Job, request: Q) -> D:
        """What the request only names; None if it is gone, or if there is none."""

    @abstractmethod
    def submit(self, job: Job) -> Submit[Q, D, R]:
        """The engine's way in for this kind."""

    @abstractmethod
    def finish(self, job: Job, request: Q, result: R) -> Message:
        """What the client gets."""


class JobTask(Task):
    """The base of the tasks: one slot in a lane, errors of our own tree without a traceback in the log."""

    Request = "workers.celery.lanes:LaneRequest"
    throws = (StokerError,)
    # The ledger stores it, in the same step in which the job ends.
    ignore_result = True


def job_task(handler: JobHandler[Any, Any, Any]) -> Task:
    """The Celery task that runs jobs of the handler's kind."""

    @shared_task(name=of_request(handler.request).task, base=JobTask, bind=True)
    def run(task: Task) -> None:
        # Returned, the result would go into an event for all who watch, shown part by part: it is its client's.
        run_job(Delivery(task), handler)

    return run


class Job:
    """A job that this delivery owns: what its handler knows of it while it runs.

    `resources`: folders and files that go when the job is done here.
    """

    def __init__(self, delivery: Delivery, claim: Claim, resources: ExitStack) -> None:
        self.id, self.runtime = delivery.id, delivery.runtime
        self.claim, self.resources = claim, resources
        self._delivery = delivery
        #: Names of what its prompt begins with.
        self._beginnings: Sequence[str] = ()
        #: By `time.monotonic`.
        self._claimed = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the job was sent: those until the claim, and those that its input took since."""
        return self.claim.age + time.monotonic() - self._claimed

    @property
    def lease(self) -> JobLease:
        """Of this delivery."""
        return self._delivery.lease

    @property
    def token(self) -> str:
        """Names this delivery as the job's owner."""
        return self.lease.token

    def usage(self, usage: Usage) -> Usage:
        """With what only the worker knows: its name, and how long the job waited."""
        return usage.model_copy(update={"worker": self.runtime.name, "queued_seconds": self.claim.age})

    def seconds_left(self, deadline: float | None) -> float | None:
        """Of `deadline`, which counts from the moment when the job was sent. Raises `DeadlineExceeded` if none are."""
        if deadline is None:
            return None
        age = self.age
        left = deadline - age
        if left <= 0:
            raise DeadlineExceeded(f"job {self.id}: it waited {age:.1f} s, past its deadline of {deadline:g} s.")
        return left

    def place(self, request: GenerateRequest) -> None:
        """Raises `PassedOn` if another worker has more of the prompt than this one, and gets the job for that."""
        placing = self.runtime.placing
        self._beginnings = placing.names(request)
        worker = None if self.claim.resumed else placing.better(request.model, self._beginnings)
        if worker is not None and self.lease.pass_on(worker):
            placing.recall_later(self.id, self.lease.queue, worker)
            raise PassedOn(f"{worker} has the beginning of its prompt and may take it.")

    def where_it_fits(
        self, submit: Submit[GenerateRequest, D, R], job_id: str, request: GenerateRequest, data: D, /,
        *, deadline: float | None,
    ) -> Ticket[R]:  # fmt: skip
        """`submit`, here; raises `PassedOn` for a prompt that another worker's memory holds and this one's does not,
        and `InvalidRequest` where none does."""
        try:
            return submit(job_id, request, data, deadline=deadline)
        except BeyondMemory as error:
            raise self._elsewhere(request.model, error) from None

    def _elsewhere(self, model: str, error: BeyondMemory) -> StokerError:
        memories = self.runtime.persist(lambda: self.runtime.placing.memories(model))
        enough = [memory for memory in memories if memory.tokens > error.tokens]
        if not enough:
            return InvalidRequest(f"{error}{_largest(memories)}")
        best = max(enough, key=lambda memory: (memory.free, memory.tokens))
        if self.lease.pass_on(best.worker, needed=True):
            return PassedOn(f"{best.worker} has memory for its prompt of {error.tokens} tokens, and may take it.")
        return InvalidRequest(str(error))

    def note_beginnings(self) -> None:
        """From now on this worker has those of the prompt that was placed."""
        self.runtime.placing.note(self._beginnings)

    def taking(self, load: Callable[[], R]) -> R:
        """What `load` returns. What it has taken goes with the job, and at once where it fails: it is tried again, and
        the files of each try would fill the disk."""
        with ExitStack() as taken:
            kept, self.resources = self.resources, taken
            try:
                loaded = load()
            finally:
                self.resources = kept
            kept.push(taken.pop_all())
        return loaded

    def wait(self, ticket: Ticket[R]) -> R:
        """Report the job's progress until it ends; raises what it ended with."""
        reported = None
        with self.runtime.running(self._delivery.lease.token, ticket):
            # A cancel that came before the claim came with it; one that comes now finds the ticket.
            if self.claim.cancelled:
                self.runtime.cancel(self.id)
            while not ticket.wait(PROGRESS_EVERY):
                progress = ticket.progress
                if progress is not None and progress != reported:
                    reported = progress
                    # Flower shows it as the task's state.
                    self._delivery.report("task-progress", progress=round(progress, 4))
            self._delivery.account.ran(ticket)
            return ticket.result()


def _largest(memories: Sequence[Memory]) -> str:
    """What a refusal says of the other workers, behind the words for this one."""
    largest = max(memories, key=lambda memory: memory.tokens, default=None)
    if largest is None or not largest.tokens:
        return ""
    return f" Of the other workers {node_of(largest.worker)} has most: {largest.tokens} tokens."


def run_job(delivery: Delivery, handler: JobHandler[Q, D, R]) -> dict[str, Any]:
    """Run one job on the engine; returns its encoded result, which goes no further than its caller.

    A cancelled job ends as Celery's REVOKED; a stopping worker's job goes back to the queue; a fenced one leaves no
    trace; any other error reaches the client as a class of `stoker.errors`.
    """
    persist, publisher, account = delivery.runtime.persist, delivery.runtime.publisher, delivery.account
    with answering_celery(delivery), accounted(delivery), ExitStack() as resources:
        with recording_errors(delivery):
            job = Job(delivery, delivery.claim(), resources)
            with account.phase("load"):
                asked = read(handler.request, job.claim.request)
                request = persist(lambda: handler.prepare(job, asked))
                data = persist(lambda: job.taking(lambda: handler.load_input(job, request)))
            # What the broker did not take of an earlier delivery is no failure of this one.
            publisher.forget(job.id)
            resources.callback(publisher.leave, job.id)
            ticket = handler.submit(job)(job.id, request, data, deadline=job.seconds_left(request.deadline))
            made = job.wait(ticket)
            with account.phase("publish"):
                publisher.flush(job.id)
            with account.phase("finish"):
                finished = handler.finish(job, request, made)
            result = _fields(finished)
        with account.phase("complete"):
            delivery.lease.complete(ledger.success(delivery.id, result))
        account.made(finished)
    return result


def _fields(result: Message) -> dict[str, Any]:
    fields = encode(result)
    del fields["contract"]
    return fields
