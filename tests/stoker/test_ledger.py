"""The ledger's transitions, on a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stoker import keys, ledger
from stoker.client_core import JobStatus, Outcome
from stoker.connection import connect
from stoker.ledger import MAX_DEATHS, Claim
from stoker.settings import Settings

QUEUE = keys.queue("toy", "generate")
RECORD = {"kind": "generate", "model": "toy", "queue": QUEUE, "request": '{"prompt": "x"}'}


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    client = connect(broker)
    yield client
    client.close()


def claim(redis: Any, token: str, tag: str = "tag") -> Claim:
    return Claim.parse(ledger.claim(redis, "job", token, tag, f"worker-{token}"))


def test_a_job_is_submitted_once(redis: Any) -> None:
    assert ledger.submit(redis, "job", RECORD)[0] == b"new"
    assert ledger.submit(redis, "job", RECORD)[0] == b"known"
    assert list(ledger.open_jobs(redis, [QUEUE])) == ["job"]


def test_a_full_queue_takes_nothing(redis: Any) -> None:
    redis.rpush(ledger.queue_keys(QUEUE)[0], "a")
    redis.rpush(ledger.queue_keys(QUEUE)[7], "b")
    assert ledger.submit(redis, "job", RECORD, limit=2) == [b"full", 2]
    assert redis.exists(keys.job("job")) == 0
    assert ledger.submit(redis, "job", RECORD, limit=3)[0] == b"new"


def test_a_second_delivery_of_a_running_job_is_dropped(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    assert claim(redis, "one", "tag-1").state == "run"
    assert claim(redis, "two", "tag-2").state == "duplicate"
    assert redis.hget(keys.job("job"), "token") == b"one"


def test_the_same_delivery_again_means_that_its_owner_went_silent(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    assert not claim(redis, "one").resumed
    again = claim(redis, "two")
    assert (again.state, again.resumed) == ("run", True)
    assert ledger.settle(redis, "job", QUEUE, "one") == 0, "the first owner is fenced"
    assert ledger.settle(redis, "job", QUEUE, "two") == 1


def test_a_job_that_outlives_its_owners_too_often_is_dead(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    states = [claim(redis, str(number)).state for number in range(MAX_DEATHS + 1)]
    assert states == ["run"] * MAX_DEATHS + ["dead"]
    history = ledger.bury(redis, "job")
    assert [death["worker"] for death in history] == [f"worker-{number}" for number in range(MAX_DEATHS)]
    assert redis.hexists(keys.DEAD, "job")
    assert ledger.settle(redis, "job", QUEUE, str(MAX_DEATHS)) == 1, "whoever buries it may end it"
    ledger.forget(redis.pipeline(), "job").execute()
    assert ledger.submit(redis, "job", RECORD)[0] == b"new"


def test_an_owner_that_gives_the_job_back_is_not_held_against_it(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    for number in range(2 * MAX_DEATHS):
        assert claim(redis, str(number)).state == "run"
        assert ledger.release(redis, "job", str(number)) == 1
    assert ledger.release(redis, "job", "stranger") == 0


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_delivery_of_a_job_that_has_ended_is_dropped(redis: Any, status: str) -> None:
    ledger.submit(redis, "job", RECORD)
    redis.set(keys.result("job"), f'{{"status": "{status}"}}', ex=60)
    assert claim(redis, "late").state == "ended"


def test_cancelling_a_waiting_job_ends_it_without_a_worker(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    listener = redis.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.result("job"))
    listener.get_message(timeout=1)
    assert ledger.cancel(redis, "job", QUEUE) == b"cancelled"
    outcome = Outcome.parse(redis.get(keys.result("job")))
    assert outcome is not None
    assert outcome.status == JobStatus.CANCELLED
    assert listener.get_message(timeout=5) is not None, "who waits is told"
    listener.close()
    assert claim(redis, "late").state == "ended"
    assert ledger.cancel(redis, "job", QUEUE) == b"ended"
    assert not ledger.open_jobs(redis, [QUEUE])


def test_cancelling_a_running_job_asks_its_owner(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    claim(redis, "one")
    assert ledger.cancel(redis, "job", QUEUE) == b"asked"
    assert redis.exists(keys.cancel("job")) == 1
    ledger.settle(redis, "job", QUEUE, "one")
    assert redis.exists(keys.cancel("job")) == 0


def test_cancelling_what_nobody_knows_leaves_no_trace(redis: Any) -> None:
    assert ledger.cancel(redis, "job", QUEUE) == b"unknown"
    assert redis.dbsize() == 0


def test_orphans_are_open_jobs_without_owner_or_message(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    assert ledger.orphans(redis, QUEUE, older_than=60) == [], "its message may be on its way"
    assert ledger.orphans(redis, QUEUE, older_than=0) == ["job"]
    redis.rpush(ledger.queue_keys(QUEUE)[3], "some message")
    assert ledger.orphans(redis, QUEUE, older_than=0) == [], "it may be among those that wait"
    redis.delete(ledger.queue_keys(QUEUE)[3])
    claim(redis, "one")
    assert ledger.orphans(redis, QUEUE, older_than=0) == []


def test_what_has_lost_its_record_is_no_open_job(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    redis.delete(keys.job("job"))
    assert ledger.orphans(redis, QUEUE, older_than=0) == []
    assert redis.zcard(keys.open_jobs(QUEUE)) == 0


def test_the_age_counts_from_the_submission_by_the_brokers_clock(redis: Any) -> None:
    ledger.submit(redis, "job", RECORD)
    redis.hset(keys.job("job"), "submitted", "1.0")
    assert claim(redis, "one").age > 1e9
