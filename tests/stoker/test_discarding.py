"""What a job has made leaves the broker when its client has it; what others may need stays."""

from __future__ import annotations

from typing import Any

import pytest

from stoker import Client, GenerateJob, GenerateResult
from stoker.broker import keys, ledger
from stoker.broker.ledger.discarding import discard
from stoker.broker.ledger.ending import Ending
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.errors import JobFailed, JobLost
from stoker.settings import Settings
from stoker.testing import FakeClient

QUEUE = keys.queue("m", "generate")


def begun(redis: Any, job_id: str) -> None:
    ledger.submit(redis, job_id, job_record(generate_request("m", "Hello", 1, {}), job_id))
    assert ledger.claim(redis, job_id, QUEUE, "token", job_id, "worker").state == "run"
    redis.xadd(keys.stream(job_id), {"entry": "x" * 1000})
    redis.expire(keys.stream(job_id), keys.RESULT_TTL)


def ended(redis: Any, job_id: str, ending: Ending) -> None:
    begun(redis, job_id)
    assert ledger.complete(redis, job_id, QUEUE, "token", ending)


def size(redis: Any, job_id: str) -> int:
    named = (keys.job(job_id), keys.result(job_id), keys.stream(job_id), keys.blob(keys.vectors(job_id)))
    return sum(redis.memory_usage(key) or 0 for key in named)


def test_of_a_result_that_was_discarded_minutes_are_left_and_its_readers_are_told(redis: Any, broker: Settings) -> None:
    ended(redis, "a", ledger.success("a", {"text": "x" * 10_000}))
    ended(redis, "b", ledger.success("b", {}))
    before = size(redis, "a")
    discard("a").on(redis)
    assert size(redis, "a") < before / 8
    assert not redis.exists(keys.stream("a"))
    for key in (keys.job("a"), keys.result("a")):
        assert 0 < redis.ttl(key) <= keys.FETCHED_TTL
    assert redis.ttl(keys.result("b")) > keys.FETCHED_TTL
    assert redis.exists(keys.stream("b"))
    with Client(settings=broker) as client:
        job = client.job("a")
        assert isinstance(job, GenerateJob)
        assert job.status() == "done"
        with pytest.raises(JobLost, match=r"`discard\(\)` took what it made"):
            job.result(5)
        with pytest.raises(JobLost, match=r"`discard\(\)` took what it made"):
            list(job.stream(timeout=5))
        # Sent again in these minutes it is the same job, as any id that is known.
        again = job_record(generate_request("m", "Hello", 1, {}), "a")
        assert ledger.submit(redis, "a", again).state == "known"
    assert redis.zcard(keys.open_jobs(QUEUE)) == 0
    discard("a").on(redis)
    assert 0 < redis.ttl(keys.result("a")) <= keys.FETCHED_TTL


def test_a_job_that_runs_goes_on_though_somebody_discards_it(redis: Any) -> None:
    begun(redis, "a")
    discard("a").on(redis)
    assert redis.exists(keys.stream("a"))
    assert redis.ttl(keys.job("a")) > keys.FETCHED_TTL
    assert ledger.complete(redis, "a", QUEUE, "token", ledger.success("a", {"text": "x"}))
    assert b'"text": "x"' in redis.get(keys.result("a"))


def test_an_error_stays_for_those_who_ask_for_it(redis: Any, broker: Settings) -> None:
    ended(redis, "a", ledger.failure("a", JobFailed("it broke")))
    discard("a").on(redis)
    assert redis.ttl(keys.result("a")) > keys.FETCHED_TTL
    with Client(settings=broker) as client, pytest.raises(JobFailed, match="it broke"):
        client.job("a").result(5)


def test_a_job_that_the_broker_forgot_can_be_discarded(redis: Any) -> None:
    discard("a").on(redis)
    assert not redis.keys("*")


def test_answers_of_a_bulk_call_leave_the_broker_as_they_are_handed_out() -> None:
    client = FakeClient()
    client.script.generate("Hello", times=2)
    client.script.generate(error=JobFailed("it broke"))
    answers = list(client.generate_many(["a", "b", "c"], attempts=1))
    assert [type(answer) for answer in answers] == [GenerateResult, GenerateResult, JobFailed]
    jobs = [client.job(sent.job_id) for sent in client.sent.jobs]
    with pytest.raises(JobFailed):
        jobs.pop().result(1)
    for job in jobs:
        with pytest.raises(JobLost, match=r"`discard\(\)` took what it made"):
            job.result(1)
