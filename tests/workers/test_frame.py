"""The frame of every job: how what the engine raised ends the job, or sends it back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ReadOnlyError

from stoker.broker import keys, ledger
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.broker.outcome import JobStatus, Outcome
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.contract import GenerateRequest, Usage
from stoker.errors import (
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobFailed,
    OutOfMemory,
    UnknownAdapter,
    WorkerUnavailable,
)
from stoker.settings import Settings
from workers import frame, memory, mending, runtime
from workers.artifacts import StoreTrouble
from workers.frame import run_job
from workers.lanes import LaneRequest
from workers.mending import Mender
from workers.runtime import Fenced

QUEUE = keys.queue("m", "generate")
OUT = RuntimeError("[malloc_or_wait] Unable to allocate 4096 bytes.")


class Worker:
    """A worker whose engine ends every job as it is told."""

    def __init__(self, redis: Any) -> None:
        self.redis, self.name, self.shrunk, self.deliveries = redis, "w@here", 0, 0
        self.ends: Callable[[], Any] = lambda: None
        self.publisher = SimpleNamespace(flush=lambda job_id: None, forget=lambda job_id: None)
        self.ticket = SimpleNamespace(result=lambda: self.ends(), wait=lambda seconds: True)
        self.engine = SimpleNamespace(submit=lambda *_, **__: self.ticket)
        self.cancels: list[str] = []
        self.mender = Mender(redis, lambda: [QUEUE])
        self.running = lambda token, ticket: nullcontext()
        ledger.submit(redis, "job", job_record(generate_request("m", "x", 0, {}), "job"))

    def tell(self, *_: Any, **__: Any) -> None:
        """The broker is away at every report."""
        raise OperationalError("Connection refused")

    def persist(self, action: Callable[[], Any]) -> Any:
        return action()

    def cancel(self, job_id: str) -> None:
        self.cancels.append(job_id)

    def deliver(self, ends: Callable[[], Any], job_id: str = "job") -> Any:
        self.ends, self.deliveries = ends, self.deliveries + 1
        request = SimpleNamespace(
            id=job_id,
            delivery_info={"routing_key": QUEUE},
            stoker_token=f"token-{self.deliveries}",
            stoker_tag="tag",
        )
        task: Any = SimpleNamespace(name="stoker.generate", request=request, send_event=self.tell)
        return run_job(task, GenerateRequest, lambda run, request, value: Usage(completion_tokens=value))

    @property
    def outcome(self) -> Outcome | None:
        return Outcome.parse(self.redis.get(keys.result("job")))

    def shrink(self, kind: str) -> None:
        self.shrunk += 1


@pytest.fixture
def worker(broker: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    redis = connect(broker)
    made = Worker(redis)
    monkeypatch.setattr(runtime, "_current", made)
    monkeypatch.setattr(frame, "lanes", made)
    yield made
    redis.close()


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


@pytest.mark.parametrize(("error", "told"), [(UnknownAdapter("no"), UnknownAdapter), (KeyError("no"), JobFailed)])
def test_an_error_ends_the_job_with_its_class(worker: Worker, error: Exception, told: type[Exception]) -> None:
    with pytest.raises(told):
        worker.deliver(raising(error))
    assert worker.outcome is not None
    with pytest.raises(told, match="no"):
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


def test_progress_that_cannot_be_told_fails_no_job(worker: Worker) -> None:
    """Found by the chaos suite: the broker was away when Flower was to be told."""
    waits = iter([False, True])
    worker.ticket.wait, worker.ticket.progress = (lambda seconds: next(waits)), 0.5
    assert worker.deliver(lambda: 1)["completion_tokens"] == 1


def test_a_cancelled_job_is_revoked(worker: Worker) -> None:
    with pytest.raises(Ignore):
        worker.deliver(raising(JobCancelled("x")))
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.CANCELLED


def test_a_stopping_workers_job_goes_back_without_owner_and_without_a_crash(worker: Worker) -> None:
    for _ in range(2 * ledger.MAX_CRASHES):
        with pytest.raises(Reject) as back:
            worker.deliver(raising(WorkerUnavailable("stopping")))
        assert back.value.requeue
    assert worker.outcome is None
    assert worker.redis.hget(keys.job("job"), Field.TOKEN) is None


def test_out_of_memory_sends_a_job_back_to_a_smaller_lane_and_fails_it_in_the_end(worker: Worker) -> None:
    for attempt in range(1, memory.TRIES):
        with pytest.raises(Reject):
            worker.deliver(raising(OUT))
        assert (worker.outcome, worker.shrunk) == (None, attempt)
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


def test_a_result_is_stored_when_the_whole_stream_is_in_the_broker(worker: Worker) -> None:
    """A reader that sees the result finds every token."""
    seen: list[tuple[str, Outcome | None]] = []
    worker.publisher.flush = lambda job_id: seen.append((job_id, worker.outcome))
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


def test_a_fenced_delivery_leaves_neither_result_nor_ack(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    fenced: list[str] = []
    request: Any = SimpleNamespace(fence=lambda: fenced.append("token-1"))
    monkeypatch.setattr(LaneRequest, "by_token", {"token-1": request})
    with pytest.raises(Ignore):
        worker.deliver(raising(Fenced("job runs elsewhere")))
    assert fenced == ["token-1"]
    assert worker.outcome is None


def test_a_delivery_that_finds_itself_replaced_at_its_end_is_fenced(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fenced: list[str] = []
    request: Any = SimpleNamespace(fence=lambda: fenced.append("token-1"))
    monkeypatch.setattr(LaneRequest, "by_token", {"token-1": request})

    def ends() -> int:
        worker.redis.hset(keys.job("job"), Field.TOKEN, "another's")
        return 1

    with pytest.raises(Ignore):
        worker.deliver(ends)
    assert fenced == ["token-1"]
    assert worker.outcome is None


def test_a_stream_that_the_broker_did_not_take_fails_its_job(worker: Worker) -> None:
    worker.publisher.flush = lambda job_id: raising(JobFailed("job job: the key stoker:stream:job is wrong"))()
    with pytest.raises(JobFailed):
        worker.deliver(lambda: 1)
    assert worker.outcome is not None
    with pytest.raises(JobFailed, match="stoker:stream:job"):
        worker.outcome.unwrap("job")


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


def test_what_is_no_result_does_not_count_as_one(worker: Worker) -> None:
    worker.redis.set(keys.result("job"), "garbage", ex=60)
    with pytest.raises(Ignore):
        worker.deliver(lambda: 1)
    assert worker.outcome is not None
    assert worker.outcome.status == JobStatus.FAILED


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
    """`persist` has asked for as long as there was a point in it."""
    monkeypatch.setattr(ledger, "claim", lambda *_: raising(error)())
    with pytest.raises(Reject) as back:
        worker.deliver(lambda: 1)
    assert back.value.requeue
    assert worker.outcome is None
