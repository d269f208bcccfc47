"""The frame of every job: how what the engine raised ends the job, or sends it back."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError
from kombu.utils.imports import symbol_by_name
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, OutOfMemoryError, ReadOnlyError

import tasks.adapters
import tasks.embed
import tasks.generate
import tasks.train
from engine.ticket import Ticket
from stoker.broker import keys, ledger
from stoker.broker.ledger.record import Field
from stoker.broker.outcome import JobStatus, Outcome
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.contract import GenerateRequest, ModelCard, StreamToken, Usage
from stoker.contract.kinds import KINDS
from stoker.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobFailed,
    OutOfMemory,
    StokerError,
    UnknownAdapter,
    WorkerUnavailable,
)
from stoker.settings import Settings
from workers import job, memory
from workers.account import DeliveryEnd, JobAccount, Observers
from workers.artifacts import StoreTrouble
from workers.capacity import DoesNotFit
from workers.celery.lanes import LaneRequest
from workers.context import WorkerContext
from workers.delivery import Delivery
from workers.job import Job, JobHandler, Submit, run_job
from workers.services import mending
from workers.services.joblog import JobLog
from workers.services.runtime import Fenced, Runtime

QUEUE = keys.queue("m", "generate")
OUT = RuntimeError("[malloc_or_wait] Unable to allocate 4096 bytes.")


class Engine:
    """Ends every job at once, as `ends` says."""

    def __init__(self) -> None:
        self.ends: Callable[[], Any] = lambda: None
        self.tickets: list[Ticket[Any]] = []
        self.make_ticket: Callable[..., Ticket[Any]] = Ticket
        self.cards = [ModelCard(model="m", architecture="a", kinds=("generate",), context=1, parameters=1)]

    def submit(self, job_id: str, request: GenerateRequest, data: Any, *, deadline: float | None) -> Ticket[Any]:
        ticket = self.make_ticket(job_id, request.kind, deadline)
        self.tickets.append(ticket)
        try:
            ticket.resolve(self.ends())
        except Exception as error:
            ticket.fail(error)
        return ticket

    def wake(self) -> None: ...


class Handler(JobHandler[GenerateRequest, list[StreamToken], int]):
    """Of jobs whose results are numbers."""

    request = GenerateRequest

    def load_input(self, job: Job, request: GenerateRequest) -> list[StreamToken]:
        return []

    def submit(self, job: Job) -> Submit[GenerateRequest, list[StreamToken], int]:
        engine: Any = job.runtime.engine
        submit: Submit[GenerateRequest, list[StreamToken], int] = engine.submit
        return submit

    def finish(self, job: Job, request: GenerateRequest, result: int) -> Usage:
        return Usage(completion_tokens=result)


class Worker:
    """The context of a worker whose engine ends jobs as the test says, and deliveries to it."""

    def __init__(self, settings: Settings) -> None:
        self.engine, self.deliveries = Engine(), 0
        engine: Any = self.engine
        self.runtime = Runtime(settings, "w@here", lambda publish: engine)
        self.redis, self.publisher = self.runtime.redis, self.runtime.publisher
        self.context = WorkerContext(settings)
        self.context.install(self.runtime)
        self.context.lanes.configure({"generate": 8}, {"generate": [QUEUE]})
        ledger.submit(self.redis, "job", job_record(generate_request("m", "x", 0, {}), "job"))

    def report(self, event: str, *, retry: bool, **_: Any) -> None:
        """The broker is away at every report. One that is sent again and again would hold up its job."""
        assert not retry, event
        raise OperationalError("Connection refused")

    def deliver(self, ends: Callable[[], Any], job_id: str = "job", handler: Handler | None = None) -> Any:
        self.engine.ends, self.deliveries = ends, self.deliveries + 1
        request = SimpleNamespace(
            id=job_id,
            delivery_info={"routing_key": QUEUE},
            stoker_token=f"token-{self.deliveries}",
            stoker_tag="tag",
        )
        app = SimpleNamespace(context=self.context)
        task: Any = SimpleNamespace(app=app, name="stoker.generate", request=request, send_event=self.report)
        return run_job(Delivery(task), handler or Handler())

    @property
    def outcome(self) -> Outcome | None:
        return Outcome.parse(self.redis.get(keys.result("job")))

    @property
    def cancels(self) -> list[str]:
        """Jobs whose tickets were asked to stop."""
        return [ticket.job_id for ticket in self.engine.tickets if ticket.stop is not None]

    def close(self) -> None:
        self.runtime.stopped.set()
        self.redis.close()


@pytest.fixture
def worker(broker: Settings) -> Iterator[Worker]:
    made = Worker(broker)
    yield made
    made.close()


def raising(error: Exception) -> Callable[[], Any]:
    def end() -> Any:
        raise error

    return end


def test_a_result_is_stored_once(worker: Worker) -> None:
    assert worker.deliver(lambda: 7)["completion_tokens"] == 7
    assert worker.outcome is not None
    assert worker.outcome.value["completion_tokens"] == 7
    with pytest.raises(Ignore):
        worker.deliver(lambda: 8)
    assert worker.outcome.value["completion_tokens"] == 7


class Witness:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.begins: list[JobAccount] = []
        self.ends: list[JobAccount] = []

    def begun(self, account: JobAccount) -> None:
        self.begins.append(replace(account))

    def ended(self, account: JobAccount) -> None:
        self.ends.append(account)

    def close(self) -> None: ...


class Broken(Witness):
    """One that fails at everything."""

    def begun(self, account: JobAccount) -> None:
        raise ValueError

    ended = begun


@pytest.mark.parametrize(
    ("end", "outcome", "error"),
    [
        (None, DeliveryEnd.SUCCEEDED, ""),
        (InvalidRequest("'a secret prompt' given"), DeliveryEnd.FAILED, "InvalidRequest"),
        (KeyError("a secret prompt"), DeliveryEnd.FAILED, "JobFailed"),
        (JobCancelled("gone"), DeliveryEnd.CANCELLED, "JobCancelled"),
        (JobDead("dead"), DeliveryEnd.DEAD, "JobDead"),
        (WorkerUnavailable("stops"), DeliveryEnd.RETURNED, "WorkerUnavailable"),
        (Fenced("elsewhere"), DeliveryEnd.FENCED, "Fenced"),
    ],
)
def test_each_observer_learns_how_a_job_was_over_and_the_log_says_it_without_its_text(
    end: Exception | None, outcome: DeliveryEnd, error: str, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    witness = Witness()
    worker.runtime.observers = Observers([Broken(), witness, JobLog()])
    with caplog.at_level(logging.INFO), suppress(Ignore, Reject, StokerError):
        worker.deliver(raising(end) if end else lambda: 7)
    ((begun,), (ended,)) = witness.begins, witness.ends
    assert (begun.job, begun.kind, begun.model, begun.client, begun.attempt) == ("job", "generate", "m", "default", 1)
    assert (ended.outcome, ended.error) == (outcome, error)
    assert ended.duration >= 0 <= ended.wait
    lines = [str(record.msg % record.args) for record in caplog.records if record.name == "stoker.jobs"]
    assert len(lines) == 2
    assert lines[1].startswith(f"job job {outcome}: generate on m for default, waited 0.")
    assert not any("secret" in record.getMessage() for record in caplog.records)


def test_an_attempt_after_another_is_counted(worker: Worker) -> None:
    witness = Witness()
    worker.runtime.observers = Observers([witness])
    for end in (raising(WorkerUnavailable("stops")), raising(WorkerUnavailable("stops")), lambda: 7):
        with suppress(Reject):
            worker.deliver(end)
    assert [account.attempt for account in witness.ends] == [1, 2, 3]


def test_a_client_key_that_no_client_wrote_is_shown_to_nobody(worker: Worker) -> None:
    witness = Witness()
    worker.runtime.observers = Observers([witness])
    worker.redis.hset(keys.job("job"), Field.CLIENT, "A secret prompt")
    worker.deliver(lambda: 7)
    assert witness.ends[0].client == "?"


class Recording(Handler):
    """Says in which order its methods are called, and what is open."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self.steps = worker, ["began"]

    def prepare(self, job: Job, request: GenerateRequest) -> GenerateRequest:
        self.steps.append("prepare")
        return request.model_copy(update={"seed": 7})

    def load_input(self, job: Job, request: GenerateRequest) -> list[StreamToken]:
        self.steps.append(f"load_input of seed {request.seed}")
        job.resources.callback(self.steps.append, "closed")
        return []

    def finish(self, job: Job, request: GenerateRequest, result: int) -> Usage:
        self.steps.append(f"finish {result} of seed {request.seed}")
        job.resources.callback(lambda: self.steps.append(f"stored: {self._worker.outcome is not None}"))
        return super().finish(job, request, result)


def test_a_handler_is_asked_in_order_and_what_it_opened_stays_until_the_result_is_stored(worker: Worker) -> None:
    handler = Recording(worker)

    def work() -> int:
        handler.steps.append("the engine")
        return 3

    worker.deliver(work, handler=handler)
    assert handler.steps == [
        "began", "prepare", "load_input of seed 7", "the engine", "finish 3 of seed 7", "stored: True", "closed",
    ]  # fmt: skip


def test_what_a_handler_opened_is_closed_when_its_job_fails(worker: Worker) -> None:
    handler = Recording(worker)
    with pytest.raises(JobFailed):
        worker.deliver(raising(KeyError("a defect")), handler=handler)
    assert handler.steps == ["began", "prepare", "load_input of seed 7", "closed"]


def test_every_kind_of_job_has_its_task_and_takes_a_slot_of_its_lane() -> None:
    found: Any = [tasks.embed.embed, tasks.generate.generate, tasks.train.train, tasks.adapters.load]
    assert [task.name for task in found] == [kind.task for kind in KINDS.values()]
    assert {symbol_by_name(task.Request) for task in found} == {LaneRequest}


@pytest.mark.parametrize(("error", "expected"), [(UnknownAdapter("no"), UnknownAdapter), (KeyError("no"), JobFailed)])
def test_an_error_ends_the_job_with_its_class(worker: Worker, error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        worker.deliver(raising(error))
    assert worker.outcome is not None
    with pytest.raises(expected, match="no"):
        worker.outcome.unwrap("job")


@pytest.mark.parametrize("job_id", ["../../x", "/abs", "a/b", ".", "a\nb", "a" * 129])
def test_a_job_whose_id_could_be_a_path_ends_alone_before_it_runs(worker: Worker, job_id: str) -> None:
    ledger.submit(worker.redis, job_id, job_record(generate_request("m", "x", 0, {}), job_id))
    with pytest.raises(InvalidRequest, match=r"job id: .* given; allowed: 1 to 128 letters"):
        worker.deliver(raising(AssertionError("it ran")), job_id)
    outcome = Outcome.parse(worker.redis.get(keys.result(job_id)))
    assert outcome is not None
    assert outcome.status is JobStatus.FAILED
    assert worker.deliver(lambda: 7)["completion_tokens"] == 7
    worker.redis.flushall()


def test_progress_that_cannot_be_reported_fails_no_job(worker: Worker) -> None:
    """Found by the chaos suite: the broker was away when Flower was to hear of it."""

    class Slow(Ticket[Any]):
        waits = iter([False, True])

        def wait(self, seconds: float) -> bool:
            self.progress = 0.5
            return next(self.waits)

    worker.engine.make_ticket = Slow
    assert worker.deliver(lambda: 1)["completion_tokens"] == 1


def test_an_error_that_ends_the_waiting_for_a_job_stops_it_in_the_engine(worker: Worker) -> None:
    """Its row and its memory would stay in use for a result that nobody takes."""

    class Lost(Ticket[Any]):
        def wait(self, seconds: float) -> bool:
            raise ConnectionError("gone")

        def resolve(self, value: Any) -> None:
            """It runs on."""

    worker.engine.make_ticket = Lost
    with pytest.raises(JobFailed, match="gone"):
        worker.deliver(lambda: 1)
    assert worker.cancels == ["job"]


def test_a_cancelled_job_is_revoked(worker: Worker) -> None:
    with pytest.raises(Ignore):
        worker.deliver(raising(JobCancelled("x")))
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.CANCELLED


def test_the_monitors_hear_of_a_cancelled_job_once_and_of_no_other(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower shows STARTED for ever else."""
    heard: list[tuple[str, object]] = []
    monkeypatch.setattr(worker, "report", lambda event, retry, **fields: heard.append((event, fields["terminated"])))
    with pytest.raises(Reject):
        worker.deliver(raising(WorkerUnavailable("stopping")))
    assert heard == []
    with pytest.raises(Ignore):
        worker.deliver(raising(JobCancelled("x")))
    assert heard == [("task-revoked", True)]


def test_a_stopping_workers_job_goes_back_without_owner_and_without_a_crash(worker: Worker) -> None:
    for _ in range(2 * ledger.MAX_CRASHES):
        with pytest.raises(Reject) as back:
            worker.deliver(raising(WorkerUnavailable("stopping")))
        assert back.value.requeue
    assert worker.outcome is None
    assert worker.redis.hget(keys.job("job"), Field.TOKEN) is None


@pytest.mark.parametrize("placed", ["better", "no better", "passed on before", "resumed"])
def test_a_job_of_which_another_worker_has_more_goes_there_once_and_as_if_it_had_not_been_here(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, placed: str
) -> None:
    class Placed(Handler):
        def prepare(self, job: Job, request: GenerateRequest) -> GenerateRequest:
            job.place(request)
            return request

    witness = Witness()
    worker.runtime.observers = Observers([witness])
    recalled: list[tuple[str, ...]] = []
    placing = worker.runtime.placing
    monkeypatch.setattr(placing, "better", lambda model, names: None if placed == "no better" else "other")
    monkeypatch.setattr(placing, "recall_later", lambda *passed: recalled.append(passed))
    if placed == "resumed":
        ledger.claim(worker.redis, "job", QUEUE, "before", "tag", "w@gone")
    if placed == "passed on before":
        worker.redis.hset(keys.job("job"), Field.PASSED, "before")
    if placed != "better":
        assert worker.deliver(lambda: 7, handler=Placed())["completion_tokens"] == 7
        assert not recalled
        return
    with pytest.raises(Ignore):
        worker.deliver(lambda: 7, handler=Placed())
    assert (worker.outcome, worker.engine.tickets) == (None, [])
    assert witness.ends[-1].outcome is DeliveryEnd.PASSED_ON
    assert recalled == [("job", QUEUE, "other")]
    assert worker.redis.llen(keys.placed(QUEUE, "other")) == 1
    worker.redis.delete(keys.placed(QUEUE, "other"))
    claim = ledger.claim(worker.redis, "job", QUEUE, "later", "job#2", "other")
    assert (claim.state, claim.resumed, claim.attempt) == ("run", False, 1)


def test_an_input_that_is_loaded_again_and_again_lies_here_once(worker: Worker) -> None:
    """A broker that is full lets an input be read, and refuses what comes behind it, for minutes."""
    here, most, tries = list[int](), list[int](), iter(range(4))

    class Large(Handler):
        def load_input(self, job: Job, request: GenerateRequest) -> list[StreamToken]:
            number = next(tries)
            here.append(number)
            job.resources.callback(here.remove, number)
            most.append(len(here))
            if number < 3:
                raise OutOfMemoryError("OOM command not allowed")
            return []

    assert worker.deliver(lambda: len(here), handler=Large())["completion_tokens"] == 1, (
        "it is there while the job runs"
    )
    assert most == [1, 1, 1, 1]
    assert not here


def test_what_a_job_has_published_is_in_the_broker_before_it_goes_back(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next owner goes on behind it."""
    owners: list[tuple[str, Any]] = []

    def flush(job_id: str) -> None:
        owners.append((job_id, worker.redis.hget(keys.job("job"), Field.TOKEN)))

    monkeypatch.setattr(worker.publisher, "flush", flush)
    with pytest.raises(Reject):
        worker.deliver(raising(WorkerUnavailable("stopping")))
    assert owners == [("job", b"token-1")]


@pytest.mark.parametrize("error", [JobFailed("the key is wrong"), WorkerUnavailable("the broker is away")])
def test_a_job_goes_back_though_what_it_has_published_is_not_taken(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(worker.publisher, "flush", lambda job_id: raising(error)())
    with pytest.raises(Reject) as back:
        worker.deliver(raising(WorkerUnavailable("stopping")))
    assert back.value.requeue
    assert worker.redis.hget(keys.job("job"), Field.TOKEN) is None


def test_a_job_that_does_not_fit_goes_back_to_its_queue_and_its_lane_takes_no_other(worker: Worker) -> None:
    """Before its message goes back: this worker would take it again."""
    worker.context.lanes.configure({"generate": 4}, {"generate": [QUEUE]})
    for _ in range(2):
        worker.context.lanes.enter("generate")
    with pytest.raises(Reject) as back:
        worker.deliver(raising(DoesNotFit("it is too large next to 1", 1)))
    assert back.value.requeue
    assert worker.outcome is None
    assert worker.redis.hget(keys.job("job"), Field.TOKEN) is None
    assert worker.context.lanes.load() == {"generate": (2, 1)}


def test_out_of_memory_sends_a_job_back_to_a_smaller_lane_and_fails_it_in_the_end(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrunk: list[str] = []
    monkeypatch.setattr(worker.context.lanes, "shrink", shrunk.append)
    for attempt in range(1, memory.TRIES):
        with pytest.raises(Reject):
            worker.deliver(raising(OUT))
        assert (worker.outcome, shrunk) == (None, ["generate"] * attempt)
    with pytest.raises(OutOfMemory, match="3 times"):
        worker.deliver(raising(OUT))
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.FAILED


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EFBIG, "is full"), (errno.EROFS, "cannot be used"),
     (errno.EIO, "cannot be used"), (errno.EACCES, "cannot be used"), (errno.EPERM, "cannot be used")],
)  # fmt: skip
def test_a_job_that_finds_the_disk_full_or_unusable_is_a_dead_letter_that_says_so(
    worker: Worker, number: int, said: str
) -> None:
    why = os.strerror(number)
    with pytest.raises(JobDead, match=rf"w@here {said} .*{why}.* `stoker jobs retry job`"):
        worker.deliver(raising(OSError(number, why)))
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.FAILED
    (crash,) = json.loads(worker.redis.hget(keys.DEAD, "job"))["history"]
    assert crash["worker"] == "w@here"
    assert why in crash["trouble"]


def test_an_error_of_the_system_that_is_not_of_the_disk_is_no_dead_letter(worker: Worker) -> None:
    with pytest.raises(JobFailed):
        worker.deliver(raising(OSError(errno.EMFILE, "Too many open files")))
    assert not worker.redis.hexists(keys.DEAD, "job")


def test_a_job_whose_result_the_artifact_store_does_not_take_is_a_dead_letter(worker: Worker) -> None:
    with pytest.raises(JobDead, match=r"s3://b cannot be used.* `stoker jobs retry job`"):
        worker.deliver(raising(StoreTrouble("the artifact store s3://b cannot be used: no route")))
    assert worker.redis.hexists(keys.DEAD, "job")


def test_a_job_that_fitted_in_the_end_is_done(worker: Worker) -> None:
    with pytest.raises(Reject):
        worker.deliver(raising(OUT))
    assert worker.deliver(lambda: 1)["completion_tokens"] == 1


def test_a_defect_of_the_frame_itself_loses_no_job_and_repeats_it_only_so_often(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "complete", lambda *_: raising(ValueError("a defect"))())
    for _ in range(ledger.MAX_CRASHES):
        with pytest.raises(Reject) as back:
            worker.deliver(lambda: 1)
        assert back.value.requeue, "without it the message is gone, and the job with it"
        assert worker.outcome is None
    assert len(json.loads(worker.redis.hget(keys.job("job"), Field.HISTORY) or "[]")) == ledger.MAX_CRASHES - 1


def test_a_result_is_stored_when_the_whole_stream_is_in_the_broker(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that sees the result finds every token."""
    seen: list[tuple[str, Outcome | None]] = []
    monkeypatch.setattr(worker.publisher, "flush", lambda job_id: seen.append((job_id, worker.outcome)))
    worker.deliver(lambda: 1)
    assert seen == [("job", None)]
    assert worker.outcome is not None


def test_a_cancel_that_came_before_the_claim_stops_the_job_as_it_begins(worker: Worker) -> None:
    """Its nudge found no ticket here."""
    worker.redis.set(keys.cancel("job"), "1", ex=60)
    worker.deliver(lambda: 1)
    assert worker.cancels == ["job"]


def test_a_job_that_nobody_cancelled_is_not_stopped(worker: Worker) -> None:
    worker.deliver(lambda: 1)
    assert worker.cancels == []


@pytest.fixture
def fenced(worker: Worker) -> list[str]:
    """Tokens of deliveries that have to end without a trace."""
    found: list[str] = []
    request: Any = SimpleNamespace(token="token-1", tag="tag", queue=QUEUE, fence=lambda: found.append("token-1"))
    worker.context.deliveries.add(request)
    return found


def test_a_fenced_delivery_leaves_neither_result_nor_ack(worker: Worker, fenced: list[str]) -> None:
    with pytest.raises(Ignore):
        worker.deliver(raising(Fenced("job runs elsewhere")))
    assert fenced == ["token-1"]
    assert worker.outcome is None


@pytest.mark.parametrize(
    "error", [None, OUT, OSError(errno.ENOSPC, "full"), JobCancelled("x"), KeyError("x")], ids=repr
)
def test_a_delivery_that_finds_itself_replaced_at_its_end_is_fenced(
    worker: Worker, fenced: list[str], error: Exception | None
) -> None:
    """However it ends."""

    def ends() -> int:
        worker.redis.hset(keys.job("job"), Field.TOKEN, "another's")
        if error is not None:
            raise error
        return 1

    with pytest.raises(Ignore):
        worker.deliver(ends)
    assert fenced == ["token-1"]
    assert worker.outcome is None


def test_a_delivery_of_a_job_that_has_ended_is_acknowledged(worker: Worker, fenced: list[str]) -> None:
    """A fenced one keeps its message: it would come again and again."""
    # Its token is not the one that the fixture watches.
    worker.deliveries = 1
    worker.deliver(lambda: 1)
    worker.deliveries = 0
    with pytest.raises(Ignore):
        worker.deliver(lambda: 1)
    assert fenced == []


def test_a_delivery_that_finds_itself_replaced_makes_no_dead_letter(worker: Worker, fenced: list[str]) -> None:
    def ends() -> int:
        worker.redis.hset(keys.job("job"), Field.TOKEN, "another's")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Ignore):
        worker.deliver(ends)
    assert fenced == ["token-1"]
    assert worker.outcome is None
    assert not worker.redis.exists(keys.DEAD)


def test_a_job_that_crashed_too_many_workers_is_dead_and_does_not_run_again(worker: Worker) -> None:
    for number in range(ledger.MAX_CRASHES):
        assert ledger.claim(worker.redis, "job", QUEUE, f"crashed-{number}", "tag", f"w{number}").state == "run"
    with pytest.raises(JobDead, match=r"3 workers crashed \(w0, w1, w2\)"):
        worker.deliver(lambda: 1)
    assert worker.engine.tickets == []
    assert worker.redis.hexists(keys.DEAD, "job")
    assert worker.outcome is not None


def send_with_deadline(worker: Worker, seconds_ago: float) -> None:
    request = generate_request("m", "x", 0, {"deadline": 100.0})
    ledger.submit(worker.redis, "late", job_record(request, "late"))
    sent = float(worker.redis.hget(keys.job("late"), Field.SUBMITTED))
    worker.redis.hset(keys.job("late"), Field.SUBMITTED, sent - seconds_ago)


def test_a_deadline_counts_from_the_moment_when_the_job_was_sent(worker: Worker) -> None:
    left: list[float] = []

    def noting(job_id: str, kind: str, deadline: float) -> Ticket[Any]:
        left.append(deadline)
        return Ticket(job_id, kind, deadline)

    worker.engine.make_ticket = noting
    send_with_deadline(worker, 60)
    worker.deliver(lambda: 1, "late")
    assert left == [pytest.approx(40, abs=10)]


def slow_input(monkeypatch: pytest.MonkeyPatch, took: float) -> Handler:
    """Its input takes so many seconds: it may be of hundreds of megabytes, or the broker away meanwhile."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("workers.job.time", SimpleNamespace(monotonic=lambda: clock.now))

    class Slow(Handler):
        def load_input(self, job: Job, request: GenerateRequest) -> list[StreamToken]:
            clock.now += took
            return []

    return Slow()


def test_what_the_input_of_a_job_takes_counts_for_its_deadline(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    send_with_deadline(worker, 60)
    worker.deliver(lambda: 1, "late", slow_input(monkeypatch, took=30))
    (ticket,) = worker.engine.tickets
    assert ticket.deadline is not None
    assert ticket.deadline - ticket.submitted == pytest.approx(10, abs=9)


def test_a_job_whose_input_came_past_its_deadline_does_not_run(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    send_with_deadline(worker, 60)
    with pytest.raises(DeadlineExceeded, match=r"it waited 10\d\.\d s, past its deadline of 100 s"):
        worker.deliver(lambda: 1, "late", slow_input(monkeypatch, took=41))
    assert not worker.engine.tickets


def test_a_job_that_waited_past_its_deadline_does_not_run(worker: Worker) -> None:
    send_with_deadline(worker, 100)
    with pytest.raises(DeadlineExceeded, match="past its deadline of 100 s"):
        worker.deliver(lambda: 1, "late")
    assert worker.engine.tickets == []


def test_what_the_broker_did_not_take_of_an_earlier_delivery_is_not_held_against_the_next(worker: Worker) -> None:
    worker.publisher.start()
    spoil(worker.redis, keys.stream("job"))
    token = StreamToken(index=0, token_id=1, text="x", logit=0.0, logprob=-1.0, probability=1.0)
    worker.publisher.publish([("job", token)])
    with pytest.raises(JobFailed, match="does not take what it publishes"):
        worker.publisher.flush("job")
    worker.redis.delete(keys.stream("job"))
    assert worker.deliver(lambda: 1)["completion_tokens"] == 1
    worker.publisher.stop()


def test_progress_is_reported_when_it_has_changed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Ticket[Any]):
        steps = iter([0.25, 0.25, None, 0.5, 0.5])

        def wait(self, seconds: float) -> bool:
            self.progress = next(self.steps, 1.0)
            return self.progress == 1.0

    reported: list[float] = []
    monkeypatch.setattr(worker, "report", lambda event, retry, **fields: reported.append(fields["progress"]))
    worker.engine.make_ticket = Slow
    worker.deliver(lambda: 1)
    assert reported == [0.25, 0.5]


def test_a_result_says_which_worker_made_it_and_how_long_the_job_waited(worker: Worker) -> None:
    class Accounting(Handler):
        def finish(self, job: Job, request: GenerateRequest, result: int) -> Usage:
            return job.usage(Usage(completion_tokens=result))

    send_with_deadline(worker, 60)
    made = worker.deliver(lambda: 1, "late", Accounting())
    assert (made["worker"], made["queued_seconds"]) == (worker.runtime.name, pytest.approx(60, abs=10))


def test_a_stream_that_the_broker_did_not_take_fails_its_job(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = raising(JobFailed("job job: the key stoker:stream:job is wrong"))
    monkeypatch.setattr(worker.publisher, "flush", lambda job_id: refused())
    with pytest.raises(JobFailed):
        worker.deliver(lambda: 1)
    assert worker.outcome is not None
    with pytest.raises(JobFailed, match="stoker:stream:job"):
        worker.outcome.unwrap("job")


@pytest.mark.parametrize("end", [lambda: 1, raising(JobFailed("x")), raising(ValueError("a defect"))])
def test_a_job_leaves_the_publisher_when_it_has_ended(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, end: Callable[[], int]
) -> None:
    left: list[tuple[str, bool]] = []
    monkeypatch.setattr(worker.publisher, "leave", lambda job_id: left.append((job_id, worker.outcome is not None)))
    with suppress(JobFailed):
        worker.deliver(end)
    assert left == [("job", True)]


def spoil(redis: Any, key: str) -> None:
    redis.delete(key)
    redis.set(key, "garbage", ex=60)


WHENS = ["before the claim", "before the end"]


def spoil_at(worker: Worker, key: str, when: str) -> Callable[[], int]:
    """Spoil it now, or as the job ends: what ends the job."""
    if when == "before the claim":
        spoil(worker.redis, key)
        return lambda: 1

    def ends() -> int:
        spoil(worker.redis, key)
        return 1

    return ends


@pytest.mark.parametrize("when", WHENS)
def test_a_record_of_the_wrong_type_fails_its_job_once_with_an_error_that_names_the_key(
    worker: Worker, when: str
) -> None:
    key = keys.job("job")
    with pytest.raises(Ignore):
        worker.deliver(spoil_at(worker, key, when))
    assert worker.outcome is not None
    with pytest.raises(JobFailed, match=f"the key {key} is a string, not a hash"):
        worker.outcome.unwrap("job")


SHARED = (*mending.keys_of(QUEUE), keys.POLICY)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("key", SHARED)
def test_a_key_of_the_wrong_type_that_jobs_share_fails_none_of_them(worker: Worker, key: str, when: str) -> None:
    assert worker.deliver(spoil_at(worker, key, when))["completion_tokens"] == 1
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.DONE


@pytest.mark.parametrize("when", WHENS)
def test_a_key_that_another_worker_mended_a_moment_before_fails_no_job(
    worker: Worker, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_another() -> bool:
        mender.round()
        return False

    mender = mending.Mender(worker.redis, lambda: [QUEUE], worker.runtime.name)
    monkeypatch.setattr(worker.runtime.mender, "round", by_another)
    assert worker.deliver(spoil_at(worker, keys.sizes(QUEUE), when))["completion_tokens"] == 1


@pytest.mark.parametrize("garbage", ["garbage", "{}", "[1]", "\ud800", "[" * 50_000])
def test_a_request_that_cannot_be_read_fails_its_job(worker: Worker, garbage: str) -> None:
    worker.redis.hset(keys.job("job"), Field.REQUEST, garbage.encode(errors="surrogatepass"))
    with pytest.raises((InvalidRequest, JobFailed)):
        worker.deliver(lambda: 1)
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.FAILED


def test_a_history_that_cannot_be_read_is_none(worker: Worker) -> None:
    worker.redis.hset(keys.job("job"), Field.HISTORY, "garbage")
    assert worker.deliver(lambda: 1)["completion_tokens"] == 1


@pytest.mark.parametrize("garbage", ["garbage", "[]", "{}", '"SUCCESS"', '{"status": 5}', "\ud800"])
def test_what_is_no_result_does_not_count_as_one(worker: Worker, garbage: str) -> None:
    worker.redis.set(keys.result("job"), garbage.encode(errors="surrogatepass"), ex=60)
    assert worker.deliver(lambda: 1)["completion_tokens"] == 1
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.DONE


def test_a_job_that_has_ended_is_not_failed_by_a_key_that_was_spoiled_later(worker: Worker) -> None:
    worker.deliver(lambda: 7)
    spoil(worker.redis, keys.job("job"))
    with pytest.raises(Ignore):
        worker.deliver(lambda: 8)
    assert worker.outcome is not None
    assert worker.outcome.value["completion_tokens"] == 7


@pytest.mark.parametrize(
    "error", [ReadOnlyError("READONLY"), RedisConnectionError("gone"), NoPermissionError("NOPERM")]
)
def test_what_the_broker_refuses_for_a_while_fails_no_job(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """And there is no point in asking it again, because the worker stops."""
    worker.runtime.stopped.set()
    monkeypatch.setattr(ledger, "claim", lambda *_: raising(error)())
    with pytest.raises(Reject) as back:
        worker.deliver(lambda: 1)
    assert back.value.requeue
    assert worker.outcome is None


@pytest.mark.parametrize("task", [tasks.generate.generate, tasks.embed.embed, tasks.train.train, tasks.adapters.load])
def test_a_result_does_not_go_into_celerys_events(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Delivery", lambda _: None)
    monkeypatch.setattr(job, "run_job", lambda *_: {"text": "its client's own"})
    assert task.run() is None
