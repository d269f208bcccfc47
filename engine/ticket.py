"""One job inside the engine: who waits for it, and whether it shall stop."""

from __future__ import annotations

import time
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from stoker.contract import StreamToken, TrainReport
from stoker.errors import DeadlineExceeded, JobCancelled, StokerError, to_wire

R = TypeVar("R")


class Ticket(Generic[R]):
    """Given to the caller on submission; the job ends with an R or an error.

    `cancel` may be called from any thread, at any time, more than once. `quiet`: it is no job of a client, so its
    tokens are neither published nor counted. `sent`: when it was by its client, in seconds since the epoch, also
    where another process had it before; None: it comes from none.
    """

    def __init__(
        self,
        job_id: str,
        kind: str,
        deadline: float | None = None,
        *,
        priority: int = 5,
        quiet: bool = False,
        sent: float | None = None,
    ) -> None:
        self.sent = sent
        self.job_id, self.kind, self.priority, self.quiet = job_id, kind, priority, quiet
        #: When it is stopped, monotonic seconds; None: never.
        self.deadline = None if deadline is None else time.monotonic() + deadline
        #: Why the job shall stop; None: it shall not.
        self.stop: StokerError | None = None
        self.submitted = time.monotonic()
        self.started: float | None = None
        #: When its first entry was on its way to those who read along, and when it ended.
        self.first_entry: float | None = None
        self.ended: float | None = None
        #: How much of the job is done, 0 to 1; None for kinds that do not say.
        self.progress: float | None = None
        #: Completion → when its last token was there (monotonic seconds): what counts the gaps keeps it here.
        self.token_times: dict[int, float] = {}
        self._future: Future[R] = Future()

    def cancel(self, reason: StokerError | None = None) -> None:
        """Ask the engine to stop this job at its next step and to end it with `reason`, by default `JobCancelled`."""
        self.stop = reason or JobCancelled(f"job {self.job_id} was cancelled.")

    @property
    def stopping(self) -> bool:
        if self.stop is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.stop = DeadlineExceeded(f"job {self.job_id} was stopped at its deadline.")
        return self.stop is not None

    def result(self, timeout: float | None = None) -> R:
        """Wait for the end; raises what the engine failed the job with, or `JobCancelled`."""
        return self._future.result(timeout)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether the job ended."""
        return bool(futures.wait([self._future], seconds).done)

    @property
    def done(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> BaseException | None:
        """What it has ended with; None: it has not ended, or with a result."""
        return self._future.exception() if self._future.done() else None

    def start(self) -> None:
        """The engine has begun with this job."""
        if self.started is None:
            self.started = time.monotonic()

    @property
    def run_seconds(self) -> float:
        return time.monotonic() - (self.started or self.submitted)

    def resolve(self, value: R) -> None:
        if not self._future.done():
            self.ended = time.monotonic()
            self._future.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self._future.done():
            self.ended = time.monotonic()
            self._future.set_exception(error)

    def abort(self, error: BaseException) -> None:
        """End with `error` now; the lane frees what the job holds before its next step."""
        self.stop = to_wire(error)
        self.fail(error)

    def fail_stopped(self) -> None:
        if self.stop is not None:
            self.fail(self.stop)


#: What a job publishes while it runs, with its id.
Entry = tuple[str, StreamToken | TrainReport]


@dataclass
class StepOutput:
    """What one step of a lane made, by the jobs' tickets. The engine publishes `entries` first and then ends `ended`:
    who sees a result finds the whole stream. `rows`: of the pass that was read, or texts of the step."""

    entries: list[tuple[Ticket[Any], StreamToken | TrainReport]] = field(default_factory=list)
    ended: list[tuple[Ticket[Any], Any]] = field(default_factory=list)
    rows: int = 0

    def end(self, ticket: Ticket[R], result: R) -> None:
        """The job ends with `result` once the entries of this step are published."""
        self.ended.append((ticket, result))


def contained(error: BaseException) -> Exception:
    """`error` as one that a job may end with. A panic of a library in Rust is no `Exception`, and is one job's all the
    same; what ends the process is raised."""
    if isinstance(error, Exception):
        return error
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    return to_wire(error)
