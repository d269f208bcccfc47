"""The walk of every job: claim, decode, prepare, load its input, run, finish, complete; and what ends it early."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from celery import Task, shared_task
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from stoker.broker import ledger
from stoker.broker.ledger.replies import Claim
from stoker.contract import StreamToken, Usage, encode
from stoker.contract.base import Message
from stoker.contract.bundle import AdapterInput
from stoker.contract.codec import read
from stoker.contract.dataset import TrainInput
from stoker.contract.kinds import of_request, of_task
from stoker.contract.names import Rule, checked
from stoker.contract.requests import JobRequest
from stoker.errors import (
    DeadlineExceeded,
    JobCancelled,
    JobDead,
    JobFailed,
    OutOfMemory,
    StokerError,
    WorkerUnavailable,
    to_wire,
)
from workers import disk, memory
from workers.artifacts import StoreTrouble
from workers.context import WorkerContext
from workers.job_lease import JobLease, Spoiled, is_the_brokers
from workers.services.runtime import Fenced, Runtime

if TYPE_CHECKING:
    from engine.ticket import Ticket

log = logging.getLogger(__name__)

#: Seconds between a running job's events of progress.
PROGRESS_EVERY = 2.0
Q = TypeVar("Q", bound=JobRequest)
R = TypeVar("R")

#: What a job gets in addition to its request; see `Engine.submit`.
JobInput = Sequence[StreamToken] | TrainInput | AdapterInput | None


class JobHandler(ABC, Generic[Q, R]):
    """What a worker does for one kind of job, around the engine: its methods run in this order.

    `Q`: the request. `R`: what the engine makes of it. A method that the broker's absence breaks off is called again;
    only `finish` is not: it has `persist` for that.
    """

    request: type[Q]

    def prepare(self, job: Job, request: Q) -> Q:
        """The request with what only the worker knows."""
        return request

    def load_input(self, job: Job, request: Q) -> JobInput:
        """What the request only names; None if it is gone, or if there is none."""
        return None

    @abstractmethod
    def finish(self, job: Job, request: Q, result: R) -> Message:
        """What the client gets."""


class JobTask(Task):
    """The base of the tasks: one slot in a lane, errors of our own tree without a traceback in the log."""

    Request = "workers.celery.lanes:LaneRequest"
    throws = (StokerError,)
    # The ledger stores it, in the same step in which the job ends.
    ignore_result = True


def job_task(handler: JobHandler[Any, Any]) -> Task:
    """The Celery task that runs jobs of the handler's kind."""

    @shared_task(name=of_request(handler.request).task, base=JobTask, bind=True)
    def run(task: Task) -> dict[str, Any]:
        return run_job(Job(task), handler)

    return run


class Job:
    """One delivery of one job: what its handler knows of it while it runs."""

    def __init__(self, task: Task) -> None:
        self.context: WorkerContext = task.app.context
        self.runtime: Runtime = self.context.runtime
        self.id, self.kind = str(task.request.id), of_task(task.name)
        self._task = task
        queue, token = task.request.delivery_info["routing_key"], task.request.stoker_token
        self.lease = JobLease(self.runtime, self.id, queue, token, task.request.stoker_tag)
        self.claim = Claim("run", 0.0, False)
        #: Folders and files that go when the job is done here.
        self.resources = ExitStack()
        self._reported: float | None = None

    def take(self) -> None:
        """Become the job's owner. Raises `Ignore` for a delivery that has nothing to do any more."""
        self.claim = self.lease.claim()
        # The id will be a folder's name.
        checked(Rule.JOB_ID, "job id", self.id)
        if self.claim.state in _DROPPED:
            log.info("job %s: dropped a delivery of a job that %s", self.id, _DROPPED[self.claim.state])
            raise Ignore
        if self.claim.state == "dead":
            history = self.lease.dead_letter()
            workers = ", ".join(crash.worker for crash in history)
            raise JobDead(
                f"job {self.id} was running when {len(history)} workers crashed ({workers}). It is a dead letter: "
                f"`stoker jobs retry {self.id}` sends it again."
            )

    def execute(self, request: JobRequest, data: JobInput) -> Any:
        """Run the job on the engine; raises what it ended with."""
        self.runtime.publisher.forget(self.id)
        submit: Callable[..., Ticket[Any]] = self.runtime.engine.submit
        ticket = submit(self.id, request, data, deadline=self._seconds_left(request))
        with self.runtime.running(self.lease.token, ticket):
            # A cancel that came before the claim came with it; one that comes now finds the ticket.
            if self.claim.cancelled:
                self.runtime.cancel(self.id)
            while not ticket.wait(PROGRESS_EVERY):
                self._report_progress(ticket.progress)
            value = ticket.result()
        self.runtime.publisher.flush(self.id)
        return value

    def _seconds_left(self, request: JobRequest) -> float | None:
        if request.deadline is None:
            return None
        left = request.deadline - self.claim.age
        if left <= 0:
            raise DeadlineExceeded(
                f"job {self.id}: it waited {self.claim.age:.1f} s, past its deadline of {request.deadline:g} s."
            )
        return left

    def _report_progress(self, progress: float | None) -> None:
        """Flower shows it as the task's state."""
        if progress is not None and progress != self._reported:
            self._reported = progress
            self.report("task-progress", progress=round(progress, 4))

    def report(self, event: str, **fields: object) -> None:
        """Send an event to the monitors, above all Flower. No job waits for it, and none fails if it cannot be sent."""
        try:
            self._task.send_event(event, retry=False, **fields)
        except (OperationalError, RedisError, OSError) as error:
            log.debug("job %s: %s was not sent: %s", self.id, event, error)

    def usage(self, usage: Usage) -> Usage:
        """With what only the worker knows: its name, and how long the job waited."""
        return usage.model_copy(update={"worker": self.runtime.name, "queued_seconds": self.claim.age})


_DROPPED = {
    "ended": "has ended",
    "duplicate": "runs already",
    "unknown": "the broker knows no longer",
    "spoiled": "has a record that no client wrote",
}


def run_job(job: Job, handler: JobHandler[Q, R]) -> dict[str, Any]:
    """Run one job on the engine and return its encoded result.

    A cancelled job ends as Celery's REVOKED; a stopping worker's job goes back to the queue; a fenced one leaves no
    trace; any other error reaches the client as a class of `stoker.errors`.
    """
    persist = job.runtime.persist
    with _telling_celery(job), job.resources:
        with _recording_errors(job):
            job.take()
            asked = read(handler.request, job.claim.request)
            request = persist(lambda: handler.prepare(job, asked))
            data = persist(lambda: handler.load_input(job, request))
            made: R = job.execute(request, data)
            result = _fields(handler.finish(job, request, made))
        job.lease.complete(ledger.success(job.id, result))
        return result


def _fields(result: Message) -> dict[str, Any]:
    fields = encode(result)
    del fields["contract"]
    return fields


@contextmanager
def _recording_errors(job: Job) -> Iterator[None]:
    """End the job in the ledger with the error that ends it, which is raised as the one that its client gets."""
    try:
        yield
    except (WorkerUnavailable, Ignore, Spoiled):
        raise
    except JobCancelled:
        job.lease.complete(ledger.revoked(job.id))
        raise
    except StokerError as error:
        job.lease.complete(ledger.failure(job.id, error))
        raise
    except Exception as error:
        if is_the_brokers(error):
            raise
        known = _known(job, error)
        log.error("job %s failed: %s", job.id, known)
        job.lease.complete(ledger.failure(job.id, known))
        raise known from error


def _known(job: Job, error: Exception) -> StokerError:
    """What the client gets for an error that is none of ours. Raises `WorkerUnavailable` if the job may try again."""
    if memory.is_out_of_memory(error):
        return _out_of_memory(job, error)
    if trouble := disk.trouble(error):
        return _dead_letter(job, f"the disk of {job.runtime.name} {trouble} ({error})")
    if isinstance(error, StoreTrouble):
        return _dead_letter(job, str(error))
    if isinstance(error, RedisError):
        return JobFailed(f"job {job.id}: {job.lease.blame(error)}.")
    # A defect: only its traceback says where.
    log.error("job %s: %s", job.id, error, exc_info=error)
    return to_wire(error)


def _out_of_memory(job: Job, error: Exception) -> OutOfMemory:
    """The job may try again, in a smaller lane, except if it has ended so too often."""
    job.context.lanes.shrink(job.kind.name)
    if job.lease.count_out_of_memory() < memory.TRIES:
        raise WorkerUnavailable(f"out of memory together with other jobs ({error}).") from error
    return OutOfMemory(f"job {job.id}: {memory.TRIES} times there was not memory enough for it ({error}).")


def _dead_letter(job: Job, what: str) -> JobDead:
    """Make a dead letter of a job that can go on once `what` is mended."""
    job.lease.dead_letter(job.runtime.name, what)
    return JobDead(
        f"job {job.id} is a dead letter: {what}. What was whole stays. Mend that, then "
        f"`stoker jobs retry {job.id}` lets it go on."
    )


@contextmanager
def _telling_celery(job: Job) -> Iterator[None]:
    """Turn what ended the job, or this delivery of it, into what Celery does with its message."""
    try:
        yield
    except Fenced:
        # Neither result nor ack: another worker owns both.
        job.context.deliveries.fence(job.lease.token)
        raise Ignore from None
    except WorkerUnavailable as error:
        log.info("job %s goes back to the queue: %s", job.id, error)
        job.lease.release()
        raise Reject(str(error), requeue=True) from None
    except JobCancelled:
        # Flower shows STARTED for ever without this event.
        job.report("task-revoked", terminated=True, signum=None, expired=False)
        raise Ignore from None
    except Spoiled as trouble:
        _give_up(job, trouble)
        raise Ignore from None
    except (StokerError, Ignore):
        raise
    except Exception as error:
        # A defect outside the job itself. Its message stays, and the next claim counts it as a crash: never lost, and
        # after some of them a dead letter.
        log.exception("job %s could not be ended", job.id)
        raise Reject(str(error), requeue=True) from None


def _give_up(job: Job, trouble: Spoiled) -> None:
    try:
        job.lease.give_up(trouble)
    except Spoiled as still:
        # What jobs share was spoiled again, a moment after it was mended: the message comes back.
        raise Reject(str(still), requeue=True) from None
