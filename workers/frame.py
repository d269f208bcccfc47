"""The frame that every job runs in: claim, decode, run, complete, report how it ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from celery import Task
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from stoker.broker import keys, ledger
from stoker.broker.connection import passes
from stoker.broker.ledger.replies import Claim, Crash
from stoker.broker.outcome import Outcome
from stoker.contract import Usage, encode
from stoker.contract.codec import read
from stoker.contract.kinds import of_task
from stoker.contract.names import Rule, checked
from stoker.contract.requests import JobRequest
from stoker.errors import (
    DeadlineExceeded,
    JobCancelled,
    JobDead,
    JobFailed,
    JobLost,
    OutOfMemory,
    StokerError,
    WorkerUnavailable,
    to_wire,
)
from workers import disk, memory
from workers.artifacts import StoreTrouble
from workers.blame import blame
from workers.context import WorkerContext
from workers.services.runtime import Fenced, Runtime

log = logging.getLogger(__name__)

#: Seconds between a running job's events of progress.
PROGRESS_EVERY = 2.0
M = TypeVar("M", bound=JobRequest)
P = ParamSpec("P")
T = TypeVar("T")


class Spoiled(Exception):
    """The ledger cannot do its work on this job, and never will: something else than it expects lies in the broker."""


class JobTask(Task):
    """The base of the tasks: one slot in a lane, errors of our own tree without a traceback in the log."""

    Request = "workers.celery.lanes:LaneRequest"
    throws = (StokerError,)
    # The ledger stores it, in the same step in which the job ends.
    ignore_result = True


class Run:
    """One delivery of one job: what the task knows of it while it runs."""

    def __init__(self, task: Task) -> None:
        self._context: WorkerContext = task.app.context
        self.runtime: Runtime = self._context.runtime
        self.job_id = str(task.request.id)
        self._task = task
        self._queue = task.request.delivery_info["routing_key"]
        self._token, self._tag = task.request.stoker_token, task.request.stoker_tag
        self.claim = Claim("run", 0.0, False)
        self._reported: float | None = None

    def take(self) -> None:
        """Become the job's owner. Raises `Ignore` for a delivery that has nothing to do any more."""
        self.claim = self._persist(ledger.claim, self._token, self._tag, self.runtime.name)
        # The id will be a folder's name.
        checked(Rule.JOB_ID, "job id", self.job_id)
        if self.claim.state in _DROPPED:
            log.info("job %s: dropped a delivery of a job that %s", self.job_id, _DROPPED[self.claim.state])
            raise Ignore
        if self.claim.state == "dead":
            history = self._dead_letter()
            workers = ", ".join(crash.worker for crash in history)
            raise JobDead(
                f"job {self.job_id} was running when {len(history)} workers crashed ({workers}). It is a dead letter: "
                f"`stoker jobs retry {self.job_id}` sends it again."
            )

    def execute(self, request: Any, data: Any) -> Any:
        """Run the job on the engine; raises what it ended with."""
        self.runtime.publisher.forget(self.job_id)
        ticket = self.runtime.engine.submit(self.job_id, request, data, deadline=self._seconds_left(request))
        with self.runtime.running(self._token, ticket):
            # A cancel that came before the claim came with it; one that comes now finds the ticket.
            if self.claim.cancelled:
                self.runtime.cancel(self.job_id)
            while not ticket.wait(PROGRESS_EVERY):
                self._report_progress(ticket.progress)
            value = ticket.result()
        self.runtime.publisher.flush(self.job_id)
        return value

    def _report_progress(self, progress: float | None) -> None:
        """Flower shows it as the task's state."""
        if progress is not None and progress != self._reported:
            self._reported = progress
            self._send("task-progress", progress=round(progress, 4))

    def _seconds_left(self, request: JobRequest) -> float | None:
        if request.deadline is None:
            return None
        left = request.deadline - self.claim.age
        if left <= 0:
            raise DeadlineExceeded(
                f"job {self.job_id}: it waited {self.claim.age:.1f} s, past its deadline of {request.deadline:g} s."
            )
        return left

    def complete(self, outcome: dict[str, Any]) -> None:
        """The job has ended so. Raises `Fenced` if it is not ours to end."""
        if not self._persist(ledger.complete, self._token, outcome):
            raise self._fenced()

    def _fenced(self) -> Fenced:
        return Fenced(f"job {self.job_id} runs elsewhere.")

    def _dead_letter(self, worker: str = "", trouble: str = "") -> tuple[Crash, ...]:
        """What the letter says of the job's owners. Raises `Fenced` if the job is not ours to give up."""
        reply = self._persist(ledger.dead_letter, self._token, worker, trouble)
        if reply.fenced:
            raise self._fenced()
        return reply.history

    def give_up(self, trouble: Spoiled) -> None:
        """End a job that the ledger cannot end: who waits for it gets the error, and its message goes."""
        record = json.dumps(ledger.failure(self.job_id, JobFailed(f"job {self.job_id}: {trouble}.")))
        log.error("job %s cannot be ended as others are: %s", self.job_id, trouble)
        if not self._has_ended():
            self.runtime.persist(lambda: self.runtime.redis.set(keys.result(self.job_id), record, ex=keys.RESULT_TTL))
            self.runtime.persist(lambda: self.runtime.redis.publish(keys.result(self.job_id), record))

    def _has_ended(self) -> bool:
        try:
            return (
                Outcome.parse(self.runtime.persist(lambda: self.runtime.redis.get(keys.result(self.job_id))))
                is not None
            )
        except (ResponseError, JobLost):
            # What lies there is no result.
            return False

    def release(self) -> None:
        self._persist(ledger.release, self._token)

    def ran_out_of_memory(self) -> bool:
        """Count that the job ended for want of memory; return whether it may try again, in a smaller lane."""
        self._context.lanes.shrink(of_task(self._task.name).name)
        count = self._persist(ledger.count_out_of_memory, self._token)
        if count == 0:
            raise self._fenced()
        return count < memory.TRIES

    def dead_letter(self, what: str) -> JobDead:
        """Make a dead letter of a job that can go on once `what` is mended; return the error to end it with."""
        self._dead_letter(self.runtime.name, what)
        return JobDead(
            f"job {self.job_id} is a dead letter: {what}. What was whole stays. Mend that, then "
            f"`stoker jobs retry {self.job_id}` lets it go on."
        )

    def forget(self) -> None:
        """Leave no trace: neither result nor ack."""
        self._context.deliveries.fence(self._token)

    def _send(self, event: str, **fields: Any) -> None:
        """Send an event to the monitors, above all Flower. No job waits for it, and none fails if it cannot be sent."""
        try:
            self._task.send_event(event, retry=False, **fields)
        except (OperationalError, RedisError, OSError) as error:
            log.debug("job %s: %s was not sent: %s", self.job_id, event, error)

    def report_revoked(self) -> None:
        # Flower shows STARTED for ever without this event.
        self._send("task-revoked", terminated=True, signum=None, expired=False)

    def _persist(
        self, transition: Callable[Concatenate[Any, str, str, P], T], *arguments: P.args, **named: P.kwargs
    ) -> T:
        """One transition of the ledger, however long the broker is away. Raises `Spoiled`."""

        def action() -> T:
            return transition(self.runtime.redis, self.job_id, self._queue, *arguments, **named)

        def once() -> T:
            return self.runtime.persist(action)

        try:
            try:
                return once()
            except ResponseError:
                if not self.runtime.mender.round():
                    raise
                return once()
        except ResponseError as error:
            if _brokers_fault(error):
                raise
            raise Spoiled(self.blame(error)) from error

    def blame(self, error: RedisError) -> str:
        return blame(self.runtime.redis, self.job_id, self._queue, error)


_DROPPED = {"ended": "has ended", "duplicate": "runs already", "unknown": "the broker knows no longer"}


def run_job(
    task: Task,
    message: type[M],
    finish: Callable[[Run, M, Any], Any],
    fetch: Callable[[Run, M], Any] = lambda run, request: None,
    amend: Callable[[Run, M], M] = lambda run, request: request,
) -> dict[str, Any]:
    """Run one job on the engine and return its encoded result.

    `amend` makes the request say what only the worker knows; `fetch` gets data that it only names; `finish` makes the
    result of what the engine returned. A cancelled job ends as Celery's REVOKED; a stopping worker's job goes back to
    the queue; a fenced one leaves no trace; any other error reaches the client as a class of `stoker.errors`.
    """
    run = Run(task)
    try:
        return _attempt(run, message, finish, fetch, amend)
    except Fenced:
        run.forget()
        raise Ignore from None
    except WorkerUnavailable as error:
        log.info("job %s goes back to the queue: %s", run.job_id, error)
        run.release()
        raise Reject(str(error), requeue=True) from None
    except JobCancelled:
        run.report_revoked()
        raise Ignore from None
    except Spoiled as trouble:
        run.give_up(trouble)
        raise Ignore from None
    except (StokerError, Ignore):
        raise
    except Exception as error:
        # A defect outside the job itself. Its message stays, and the next claim counts it as a crash: never lost, and
        # after some of them a dead letter.
        log.exception("job %s could not be ended", run.job_id)
        raise Reject(str(error), requeue=True) from None


def _attempt(
    run: Run,
    message: type[M],
    finish: Callable[[Run, M, Any], Any],
    fetch: Callable[[Run, M], Any],
    amend: Callable[[Run, M], M],
) -> dict[str, Any]:
    try:
        run.take()
        asked = read(message, run.claim.request)
        request = run.runtime.persist(lambda: amend(run, asked))
        data = run.runtime.persist(lambda: fetch(run, request))
        result = _fields(finish(run, request, run.execute(request, data)))
    except (WorkerUnavailable, Ignore, Spoiled):
        raise
    except JobCancelled:
        run.complete(ledger.revoked(run.job_id))
        raise
    except StokerError as error:
        run.complete(ledger.failure(run.job_id, error))
        raise
    except Exception as error:
        if _brokers_fault(error):
            raise
        known = _known(run, error)
        log.error("job %s failed: %s", run.job_id, known)
        run.complete(ledger.failure(run.job_id, known))
        raise known from error
    run.complete(ledger.success(run.job_id, result))
    return result


def _brokers_fault(error: Exception) -> bool:
    """Whether another worker, or this one later, may do what the broker did not: it is away, or forbids it."""
    return isinstance(error, RedisError) and (passes(error) or isinstance(error, NoPermissionError))


def _known(run: Run, error: Exception) -> StokerError:
    """What the client gets for an error that is none of ours. Raises `WorkerUnavailable` if the job may try again."""
    if memory.is_out_of_memory(error):
        if run.ran_out_of_memory():
            raise WorkerUnavailable(f"out of memory together with other jobs ({error}).") from error
        return OutOfMemory(f"job {run.job_id}: {memory.TRIES} times there was not memory enough for it ({error}).")
    if trouble := disk.trouble(error):
        return run.dead_letter(f"the disk of {run.runtime.name} {trouble} ({error})")
    if isinstance(error, StoreTrouble):
        return run.dead_letter(str(error))
    if isinstance(error, RedisError):
        return JobFailed(f"job {run.job_id}: {run.blame(error)}.")
    # A defect: only its traceback says where.
    log.error("job %s: %s", run.job_id, error, exc_info=error)
    return to_wire(error)


def _fields(result: Any) -> dict[str, Any]:
    fields = encode(result)
    del fields["contract"]
    return fields


def complete(usage: Usage, run: Run) -> Usage:
    """Add what only the worker knows: its name, and how long the job waited."""
    return usage.model_copy(update={"worker": run.runtime.name, "queued_seconds": run.claim.age})


def blob(run: Run, name: str) -> bytes | None:
    """A blob's bytes, None if it has expired."""
    return run.runtime.redis.get(keys.blob(name))  # type: ignore[no-any-return]
