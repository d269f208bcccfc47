"""Celery's `revoke`, sent as a control message: it cancels jobs wherever they are, and nothing in it hurts anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.control import Panel
from celery.worker.state import revoked as kept_by_celery
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError

from engine.ticket import Ticket
from stoker.broker import keys, ledger
from stoker.broker.ledger import record
from stoker.broker.outcome import JobStatus, Outcome
from stoker.client.requests import embed_request, generate_request
from stoker.client.submission import job_record
from stoker.settings import Settings
from workers.celery import control
from workers.celery.lanes import LaneRequest
from workers.context import WorkerContext
from workers.services import revoking
from workers.services.cancelling import CancelWatch
from workers.services.runtime import Runtime

QUEUE = keys.queue("m", "generate")
#: More than the ready list holds: the last one waits in the backlog.
MANY = 60


class Engine:
    cards = ()

    def wake(self) -> None: ...


class Worker:
    """What a control message finds in a worker, and jobs at its broker. `cancelled` is what its thread does."""

    def __init__(self, settings: Settings) -> None:
        engine: Any = Engine()
        self.runtime, self.context = Runtime(settings, "w@here", lambda publish: engine), WorkerContext(settings)
        self.redis = self.runtime.redis
        self.state = SimpleNamespace(app=SimpleNamespace(context=self.context))

    def submit(self, job_id: str) -> None:
        ledger.submit(self.redis, job_id, job_record(generate_request("m", "x", 0, {}), job_id))

    def hear(self, command: str, **arguments: object) -> dict[str, str]:
        """As kombu dispatches a control message."""
        reply: dict[str, str] = Panel.data[command](self.state, **arguments)
        while not self.context.revocations.idle:
            self.context.revocations.cancel_next(self.runtime, wait=0.0)
        return reply

    def everything(self) -> dict[bytes, bytes]:
        return {key: self.redis.dump(key) for key in self.redis.scan_iter()}

    def status(self, job_id: str) -> JobStatus | None:
        outcome = Outcome.parse(self.redis.get(keys.result(job_id)))
        return None if outcome is None else outcome.status


@pytest.fixture
def worker(broker: Settings) -> Iterator[Worker]:
    control.install()
    made = Worker(broker)
    yield made
    made.runtime.stopped.set()
    made.redis.flushall()
    made.redis.close()


COMMANDS: dict[str, dict[str, object]] = {
    "revoke": {},
    "revoke and terminate": {"terminate": True, "signal": "SIGKILL"},
    "terminate": {"signal": "SIGTERM"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_that_waits_or_is_dispatched_is_cancelled_and_no_other(worker: Worker, command: str) -> None:
    jobs = [f"job-{number}" for number in range(MANY)]
    for job_id in jobs:
        worker.submit(job_id)
    dispatched, waiting, other = jobs[0], jobs[-1], jobs[1]
    assert worker.redis.zscore(keys.dispatched(QUEUE), waiting) is None
    worker.hear(command.split()[0], task_id=[dispatched, waiting], **COMMANDS[command])
    assert {worker.status(dispatched), worker.status(waiting)} == {JobStatus.CANCELLED}
    assert worker.status(other) is None
    assert worker.redis.zcard(keys.open_jobs(QUEUE)) == MANY - 2
    assert ledger.claim(worker.redis, other, QUEUE, "token", f"{other}#1", "w").state == "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_that_runs_is_stopped(worker: Worker, command: str) -> None:
    worker.submit("job")
    ledger.claim(worker.redis, "job", QUEUE, "token", "job#1", worker.runtime.name)
    worker.redis.set(keys.worker(worker.runtime.name), "{}", ex=10)
    ticket: Ticket[Any] = Ticket("job", "generate")
    worker.hear(command.split()[0], task_id="job", **COMMANDS[command])
    with worker.runtime.running("token", ticket):
        CancelWatch(worker.runtime).hear(None)
        assert ticket.stop is not None
        ticket.fail_stopped()
    assert worker.status("job") is None, "its owner ends it"


def test_a_round_without_a_revocation_asks_the_broker_nothing(worker: Worker) -> None:
    worker.redis.close()
    worker.runtime.persist = lambda action: pytest.fail("nothing was revoked")  # type: ignore[method-assign]
    worker.context.revocations.cancel_next(worker.runtime, wait=0.0)


def test_jobs_of_every_kind_are_revoked(worker: Worker) -> None:
    ledger.submit(worker.redis, "texts", job_record(embed_request("m", ["x"], {}), "texts"))
    worker.submit("prompt")
    worker.hear("revoke", task_id=["texts", "prompt"])
    assert {worker.status("texts"), worker.status("prompt")} == {JobStatus.CANCELLED}


GARBAGE: tuple[object, ...] = (
    None, 7, "", "a b", "../x", "\x00", "\ud800", "x" * 129, {}, {"job": 1}, [None, 7, [["job"]], {"a": "job"}], b"job",
    "nobody", ["nobody", "nobody"],
)  # fmt: skip


@pytest.mark.parametrize("given", GARBAGE, ids=repr)
def test_what_names_no_job_changes_nothing(worker: Worker, given: object) -> None:
    """Celery would write a result for each id."""
    worker.submit("job")
    before = worker.everything()
    for command in ("revoke", "terminate"):
        worker.hear(command, task_id=given, terminate=given, signal=given, more=given)
    worker.hear("revoke")
    assert worker.everything() == before


def test_a_message_with_too_many_ids_says_so_and_the_first_are_cancelled(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoking, "WAITING", 2)
    worker.context.revocations = revoking.Revocations()
    worker.submit("job")
    assert "1 of 3 ids" in worker.hear("revoke", task_id=["job", "x", "y"])["error"]
    assert worker.status("job") is JobStatus.CANCELLED


def test_a_stamped_header_revokes_nothing_and_the_answer_says_what_does(worker: Worker) -> None:
    worker.submit("job")
    reply = worker.hear("revoke_by_stamped_headers", headers={"a": ["job"]}, terminate=True)
    assert "by their ids" in reply["error"]
    assert worker.status("job") is None


def test_a_cancel_that_the_broker_refuses_at_first_is_not_lost(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.submit("job")
    real: Callable[..., str] = ledger.cancel
    refusals = [ReadOnlyError("a replica")]

    def cancel(*args: Any) -> str:
        if refusals:
            raise refusals.pop()
        return real(*args)

    monkeypatch.setattr(ledger, "cancel", cancel)
    worker.hear("revoke", task_id="job")
    assert worker.status("job") is JobStatus.CANCELLED


def test_celerys_own_list_of_revoked_ids_drops_no_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any control message fills it, and so does a worker that greets. The ledger would send the job without end."""
    monkeypatch.setattr(LaneRequest, "id", "job")
    kept_by_celery.add("job")
    try:
        assert not LaneRequest.__new__(LaneRequest).revoked()
    finally:
        kept_by_celery.discard("job")


@pytest.mark.parametrize("step", ["summary", "cancel"])
def test_each_question_of_a_revocation_outlasts_a_broker_that_is_away(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    worker.submit("job")
    place: Any = record if step == "summary" else ledger
    real, failures = getattr(place, step), [RedisConnectionError("gone")]

    def once(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(place, step, once)
    worker.hear("revoke", task_id="job")
    assert worker.status("job") is JobStatus.CANCELLED


def test_of_a_message_all_ids_that_can_be_jobs_are_taken_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = revoking.Revocations()
    assert asked.idle
    assert asked.ask(["one", None, "a b", "two", "three"]) == 3
    assert not asked.idle
