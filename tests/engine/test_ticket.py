"""How a job ends: for one reason, once, after what it published, and who waits for it hears of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from engine import delivery, ticket
from engine.delivery import deliver
from engine.errand import OwnThread
from engine.fair import weights_by_kind
from engine.ticket import StepOutput, Ticket, contained
from stoker.contract import StreamToken
from stoker.contract.kinds import GENERATE, TRAIN
from stoker.errors import DeadlineExceeded, JobCancelled, StokerError, WorkerUnavailable


class Clock:
    """`time.monotonic`, moved by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ticket, "time", made)
    monkeypatch.setattr(delivery, "time", made)
    return made


def test_a_job_stops_when_its_seconds_have_passed_and_not_before(clock: Clock) -> None:
    job: Ticket[int] = Ticket("job", "generate", 5.0)
    clock.now += 4.9
    before = job.stopping
    clock.now += 0.1
    assert (before, job.stopping) == (False, True)
    job.fail_stopped()
    with pytest.raises(DeadlineExceeded, match="job job was stopped at its deadline"):
        job.result(0)


@pytest.mark.parametrize("seconds", [0.0, -3.0])
def test_a_deadline_that_has_passed_when_the_job_comes_stops_it_at_once(clock: Clock, seconds: float) -> None:
    job: Ticket[int] = Ticket("job", "generate", seconds)
    assert job.stopping
    assert isinstance(job.stop, DeadlineExceeded)


@pytest.mark.parametrize("reason", [None, WorkerUnavailable("the worker is stopping")])
def test_the_first_reason_to_stop_is_the_one_that_the_job_ends_with(clock: Clock, reason: StokerError | None) -> None:
    job: Ticket[int] = Ticket("job", "train", 5.0)
    job.cancel(reason)
    clock.now += 10.0
    assert job.stopping
    job.fail_stopped()
    assert isinstance(job.error, JobCancelled if reason is None else WorkerUnavailable)


def test_a_job_that_begins_again_here_runs_since_it_first_began(clock: Clock) -> None:
    """A row that made way waits again, and its prompt goes through the model anew."""
    job: Ticket[int] = Ticket("job", "generate")
    clock.now += 3.0
    assert job.run_seconds == 3.0, "since it came, as long as it has not begun"
    job.start()
    clock.now += 2.0
    job.start()
    clock.now += 5.0
    assert (job.started, job.run_seconds) == (103.0, 7.0)


def test_a_job_without_a_deadline_never_stops_by_itself(clock: Clock) -> None:
    job: Ticket[int] = Ticket("job", "train")
    clock.now += 1e9
    assert not job.stopping


def test_an_aborted_job_has_ended_and_its_lane_is_to_let_it_go(clock: Clock) -> None:
    job: Ticket[int] = Ticket("job", "generate")
    job.abort(OSError("the broker is away"))
    assert isinstance(job.error, OSError)
    assert job.stopping, "the lane looks at this"
    job.resolve(3)
    assert isinstance(job.error, OSError), "it ends once"


def token(index: int) -> StreamToken:
    return StreamToken(
        index=index, token_id=5, text="x", logit=0.0, logprob=0.0, probability=1.0, is_eos=False, finish_reason=None
    )


def test_who_sees_a_result_finds_the_whole_stream_before_it(clock: Clock) -> None:
    job: Ticket[Any] = Ticket("job", "generate")
    output = StepOutput(entries=[(job, token(0))])
    seen: list[tuple[bool, list[int]]] = []
    output.end(job, "the result")
    deliver(output, lambda entries: seen.append((job.done, [entry.index for _, entry in entries])))
    assert seen == [(False, [0])]
    assert job.result(0) == "the result"


def test_the_first_entry_is_noted_once(clock: Clock) -> None:
    job: Ticket[Any] = Ticket("job", "generate")
    for index in range(3):
        deliver(StepOutput(entries=[(job, token(index))]), lambda entries: None)
        clock.now += 1.0
    assert job.first_entry == 100.0


def test_what_ends_the_process_is_no_jobs_error_and_a_panic_is() -> None:
    class PanicException(BaseException):
        """What a library in Rust raises."""

    assert isinstance(contained(ValueError("x")), ValueError)
    assert isinstance(contained(PanicException("index out of bounds")), StokerError)
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(kind):
            contained(kind())


def raising(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt("x"), SystemExit("x")])
def test_who_waits_for_a_thread_hears_of_whatever_ends_it(error: BaseException) -> None:
    thread = OwnThread("x")
    with pytest.raises(type(error)):
        thread.run(raising(error))
    assert thread.run(threading.get_ident) == thread.run(threading.get_ident) != threading.get_ident()
    thread.end(60)
    with pytest.raises(WorkerUnavailable):
        thread.run(lambda: 3)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_training_has_its_share_of_the_time_that_generation_and_it_have(share: float) -> None:
    weights = weights_by_kind(share)
    generates, trains = weights[GENERATE.name], weights[TRAIN.name]
    assert trains / (generates + trains) == pytest.approx(share)
