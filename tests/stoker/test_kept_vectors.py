"""Vectors in the broker: how long they are kept, how many bytes of them, and what makes room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tasks.embed
from stoker import Client
from stoker.broker import keys, ledger, policy
from stoker.broker.ledger.discarding import discard
from stoker.broker.ledger.vectors import VECTOR_BYTES, Kept, fetch, keep, prune
from stoker.broker.outcome import read_vectors
from stoker.client.requests import embed_request
from stoker.client.submission import job_record
from stoker.contract import EmbedReply, Usage, vectors
from stoker.contract.vectors import Embedded
from stoker.errors import InvalidRequest, JobLost, QueueFull, VectorsFull, WorkerUnavailable
from stoker.settings import Settings

#: Seconds of the patience of clients here.
PATIENCE = 2.0
FEW_MINUTES = keys.FETCHED_TTL + int(PATIENCE)


def blob(job_id: str) -> str:
    return keys.blob(keys.vectors(job_id))


def sizes(redis: Any) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in redis.hgetall(keys.VECTORS_SIZES).items()}


def submit(redis: Any, job_id: str, kind: str = "embed") -> Any:
    request = embed_request("mini", ["a"], {})
    record = dict(job_record(request, job_id)) | {"kind": kind}
    return ledger.submit(redis, job_id, record)


def limit(redis: Any, count: int) -> None:
    policy.decide(redis, "vector_bytes", count)


def expire(redis: Any, *job_ids: str) -> None:
    """As if the lifetime of their vectors were over."""
    for job_id in job_ids:
        redis.delete(blob(job_id))
        for key in (keys.VECTORS_UNFETCHED, keys.VECTORS_FETCHED):
            redis.zadd(key, {job_id: 1.0}, xx=True)


def test_what_is_noted_of_vectors_that_have_expired_is_forgotten_also_where_there_is_room(redis: Any) -> None:
    assert prune(redis) == 0
    for job_id in ("fetched", "unfetched", "old-fetched", "old-unfetched"):
        keep(redis, job_id, b"x" * 10)
    for job_id in ("fetched", "old-fetched"):
        fetch(job_id, PATIENCE).on(redis)
    expire(redis, "old-fetched", "old-unfetched")
    assert sizes(redis)[":sum"] == 40
    assert prune(redis) == 2
    assert sizes(redis) == {"fetched": 10, "unfetched": 10, ":sum": 20}
    assert redis.zrange(keys.VECTORS_FETCHED, 0, -1) == [b"fetched"]
    assert redis.zrange(keys.VECTORS_UNFETCHED, 0, -1) == [b"unfetched"]
    assert prune(redis) == 0


# How long


def test_vectors_are_kept_for_a_day_and_minutes_from_the_first_fetch(redis: Any) -> None:
    submit(redis, "a")
    assert keep(redis, "a", b"x" * 100).there
    assert keys.RESULT_TTL - 10 <= redis.ttl(blob("a")) <= keys.RESULT_TTL
    assert fetch("a", PATIENCE).on(redis).data == b"x" * 100
    assert FEW_MINUTES - 10 <= redis.ttl(blob("a")) <= FEW_MINUTES
    redis.expire(blob("a"), 60)
    assert fetch("a", PATIENCE).on(redis).data == b"x" * 100, "a second result() works"
    assert redis.ttl(blob("a")) <= 60, "it does not keep them longer"
    assert redis.zscore(keys.VECTORS_UNFETCHED, "a") is None
    assert sizes(redis) == {"a": 100, ":sum": 100}, "they are there yet"
    assert redis.ttl(keys.VECTORS_FETCHED) > keys.RESULT_TTL - 10, "it names what the sizes count"


def test_a_client_that_bears_long_outages_finds_its_vectors_behind_one(redis: Any) -> None:
    """The answer to its fetch may be lost with the connection."""
    keep(redis, "a", b"x")
    fetch("a", 3600.0).on(redis)
    assert redis.ttl(blob("a")) > 3600


def test_vectors_without_an_expiry_get_one_when_they_are_fetched(redis: Any) -> None:
    redis.set(blob("a"), b"x")
    assert fetch("a", PATIENCE).on(redis).data == b"x"
    assert 0 < redis.ttl(blob("a")) <= FEW_MINUTES


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("fetched", "they were fetched before, and from then on they are kept 10 minutes"),
        ("discarded", r"`discard\(\)` took them out"),
        ("expired", "results are kept 24 hours"),
    ],
)
def test_vectors_that_are_gone_are_one_error_that_says_why(redis: Any, gone: str, says: str) -> None:
    submit(redis, "a")
    keep(redis, "a", b"x")
    if gone == "fetched":
        fetch("a", PATIENCE).on(redis)
    if gone == "discarded":
        discard("a").on(redis)
    expire(redis, "a")
    found = fetch("a", PATIENCE).on(redis)
    with pytest.raises(JobLost, match=says):
        read_vectors(EmbedReply(blob="vectors:a", rows=1, dim=1, usage=Usage()), found.data, found.became)


def test_vectors_that_are_made_again_after_they_were_fetched_wait_to_be_fetched_again(redis: Any) -> None:
    """A second delivery of the job made them: its client has not had these, so they make room for nobody."""
    limit(redis, 500)
    keep(redis, "a", b"x" * 200)
    fetch("a", PATIENCE).on(redis)
    assert keep(redis, "a", b"y" * 200).there
    assert not keep(redis, "b", b"x" * 350).there
    assert fetch("a", PATIENCE).on(redis).data == b"y" * 200


@pytest.mark.parametrize("record", [None, b"nonsense"])
def test_vectors_are_fetched_also_without_a_record_of_their_job(redis: Any, record: bytes | None) -> None:
    if record is not None:
        redis.set(keys.job("a"), record, ex=60)
    keep(redis, "a", b"x")
    assert fetch("a", PATIENCE).on(redis).data == b"x"
    discard("a").on(redis)
    found = fetch("a", PATIENCE).on(redis)
    assert (found.data, found.became) == (None, "")
    assert redis.exists(keys.job("a")) == (record is not None), "no record is made by it"


def test_what_a_job_has_made_goes_as_soon_as_the_policy_says(redis: Any) -> None:
    policy.decide(redis, "result_seconds", 120)
    submit(redis, "a")
    keep(redis, "a", b"x")
    assert ledger.claim(redis, "a", keys.queue("mini", "embed"), "token", "tag", "worker").state == "run"
    redis.xadd(keys.stream("a"), {"entry": "{}"})
    redis.expire(keys.stream("a"), keys.RESULT_TTL)
    assert ledger.complete(redis, "a", keys.queue("mini", "embed"), "token", ledger.success("a", {}))
    for key in (keys.result("a"), keys.job("a"), keys.stream("a"), blob("a")):
        assert 110 <= redis.ttl(key) <= 120, key
    with pytest.raises(InvalidRequest, match="59 given; allowed: 60 to 86400"):
        policy.decide(redis, "result_seconds", 59)
    redis.hset(keys.POLICY, "result_seconds", 1)
    keep(redis, "b", b"x")
    assert redis.ttl(blob("b")) > 120, "the policy never takes less than a client needs to look"


# How many bytes


def test_those_that_were_fetched_make_room_and_the_oldest_of_them_first(redis: Any) -> None:
    limit(redis, 1000)
    for job_id in ("a", "b", "c"):
        assert keep(redis, job_id, b"x" * 300).there
    for job_id in ("b", "a"):
        fetch(job_id, PATIENCE).on(redis)
    assert keep(redis, "d", b"x" * 300).there
    assert [job_id for job_id in "abcd" if redis.exists(blob(job_id))] == ["a", "c", "d"]
    assert sizes(redis) == {"a": 300, "c": 300, "d": 300, ":sum": 900}


def test_those_that_nobody_has_fetched_stay_and_no_more_are_kept(redis: Any) -> None:
    limit(redis, 1000)
    for job_id in ("a", "b", "c"):
        keep(redis, job_id, b"x" * 300)
    assert keep(redis, "d", b"x" * 101) == Kept(False, 900, 1000)
    assert not redis.exists(blob("d"))
    assert all(redis.exists(blob(job_id)) for job_id in "abc")
    assert keep(redis, "d", b"x" * 100).there, "up to the limit itself"


def test_vectors_larger_than_the_limit_are_kept_where_they_are_the_only_ones(redis: Any) -> None:
    limit(redis, 10)
    assert keep(redis, "a", b"x" * 100).there
    assert not keep(redis, "b", b"x").there


def test_vectors_that_are_kept_again_count_once(redis: Any) -> None:
    """By another owner of the job, or because the answer was lost."""
    for _ in range(2):
        keep(redis, "a", b"x" * 100)
    assert sizes(redis) == {"a": 100, ":sum": 100}


def test_vectors_that_are_kept_again_need_the_room_of_no_others(redis: Any) -> None:
    limit(redis, 1000)
    for _ in range(2):
        assert keep(redis, "a", b"x" * 600) == Kept(True, 0, 1000)
    assert keep(redis, "b", b"x" * 300) == Kept(True, 600, 1000)
    assert keep(redis, "a", b"x" * 701) == Kept(False, 300, 1000)
    assert keep(redis, "a", b"x" * 700).there, "as another owner has made them"
    fetch("b", PATIENCE).on(redis)
    assert keep(redis, "a", b"x" * 700) == Kept(True, 300, 1000)
    assert sizes(redis) == {"a": 700, "b": 300, ":sum": 1000}, "nobody's make room for them"


def test_vectors_that_have_expired_do_not_count(redis: Any) -> None:
    limit(redis, 1000)
    for job_id in ("a", "b"):
        keep(redis, job_id, b"x" * 500)
    fetch("a", PATIENCE).on(redis)
    expire(redis, "a", "b")
    assert keep(redis, "c", b"x" * 1000).there
    assert sizes(redis) == {"c": 1000, ":sum": 1000}
    assert (redis.zrange(keys.VECTORS_UNFETCHED, 0, -1), redis.zrange(keys.VECTORS_FETCHED, 0, -1)) == ([b"c"], [])


def test_vectors_count_for_as_long_as_they_are_kept_also_where_later_ones_are_kept_for_less(redis: Any) -> None:
    limit(redis, 1000)
    assert keep(redis, "a", b"x" * 900).there
    policy.decide(redis, "result_seconds", 60)
    assert keep(redis, "b", b"x" * 50).there
    assert redis.ttl(blob("b")) <= 60
    for key in (keys.VECTORS_SIZES, keys.VECTORS_UNFETCHED):
        assert redis.ttl(key) >= redis.ttl(blob("a")), key


@pytest.mark.parametrize("written", [b"1e999", b"nan", b"many", b"-5", b"99999"])
def test_a_sum_that_another_program_wrote_keeps_no_vectors_out(redis: Any, written: bytes) -> None:
    limit(redis, 1000)
    redis.hset(keys.VECTORS_SIZES, ":sum", written)
    redis.expire(keys.VECTORS_SIZES, 60)
    assert keep(redis, "a", b"x" * 900).there
    assert sizes(redis) == {"a": 900, ":sum": 900}


@pytest.mark.parametrize("decided", ["0", "-1", "nan", "1e3", "abc", "9" * 30])
def test_a_limit_that_the_policy_never_takes_decides_nothing(redis: Any, decided: str) -> None:
    redis.hset(keys.POLICY, "vector_bytes", decided)
    assert keep(redis, "a", b"x" * 2000) == Kept(True, 0, VECTOR_BYTES)
    redis.delete(keys.POLICY)


def test_what_is_discarded_makes_room(redis: Any) -> None:
    limit(redis, 1000)
    keep(redis, "a", b"x" * 1000)
    discard("a").on(redis)
    assert sizes(redis) == {":sum": 0}
    assert keep(redis, "b", b"x" * 1000).there


# Who waits


def test_a_broker_full_of_vectors_takes_no_job_that_makes_more_and_names_the_rule(redis: Any) -> None:
    limit(redis, 1000)
    keep(redis, "a", b"x" * 1000)
    refused = submit(redis, "b")
    assert (refused.state, refused.depth, refused.limit, refused.is_full) == ("vectors_full", 1000, 1000, True)
    assert not redis.exists(keys.job("b"))
    assert submit(redis, "g", "generate").state == "new", "other jobs make none"
    fetch("a", PATIENCE).on(redis)
    assert submit(redis, "b").state == "new"
    assert not redis.exists(blob("a")), "which was fetched"


@pytest.fixture
def client(broker: Settings, redis: Any) -> Iterator[Client]:
    card = '{"model": "mini", "architecture": "a", "kinds": ["embed"], "context": 9, "parameters": 1, "seen": %s}'
    redis.hset(keys.MODELS, "mini", card % redis.time()[0])
    redis.expire(keys.MODELS, keys.MODEL_TTL)
    with Client(url=broker.address.redis) as made:
        yield made


def test_a_client_learns_what_to_do_about_a_broker_full_of_vectors(redis: Any, client: Client) -> None:
    limit(redis, 1000)
    keep(redis, "a", b"x" * 1000)
    with pytest.raises(QueueFull, match=r"have 1000 bytes and may have 1000.*`discard\(\)`.*policy vector_bytes") as at:
        client.embed(["a"], model="mini")
    assert (at.value.depth, at.value.limit) == (1000, 1000)


class Job:
    """What the handler needs of a job."""

    id = "a"

    def __init__(self, redis: Any, looked: Callable[[int], bool] = lambda looks: False) -> None:
        self.looks = 0
        self.runtime = SimpleNamespace(redis=redis, persist=lambda action: action(), stopped=self)
        self._looked = looked

    def wait(self, seconds: float) -> bool:
        self.looks += 1
        return self._looked(self.looks)

    def usage(self, usage: Usage) -> Usage:
        return usage


def finish(job: Any) -> EmbedReply:
    made = Embedded(np.ones((2, 4), np.float32), 3, 0.1)
    return tasks.embed.EmbedHandler().finish(job, embed_request("mini", ["a", "b"], {}), made)


def test_a_job_waits_for_room_and_keeps_what_it_made_once_there_is_some(redis: Any) -> None:
    limit(redis, 1000)
    keep(redis, "other", b"x" * 1000)

    def looked(looks: int) -> bool:
        if looks == 3:
            fetch("other", PATIENCE).on(redis)
        return False

    job = Job(redis, looked)
    reply = finish(job)
    assert job.looks == 3
    assert np.array_equal(vectors.plain(read_vectors(reply, fetch("a", PATIENCE).on(redis).data)), np.ones((2, 4)))


def test_a_job_that_waits_in_vain_ends_with_one_error_and_loses_nobodys_vectors(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(redis, 1000)
    keep(redis, "other", b"x" * 1000)
    monkeypatch.setattr(tasks.embed, "ROOM_LIMIT", 0.0)
    with pytest.raises(VectorsFull, match=r"have 1000 bytes and may have 1000.*policy vector_bytes"):
        finish(Job(redis))
    assert fetch("other", PATIENCE).on(redis).data == b"x" * 1000


def test_a_worker_that_stops_gives_a_job_back_that_waits_for_room(redis: Any) -> None:
    limit(redis, 1000)
    keep(redis, "other", b"x" * 1000)
    with pytest.raises(WorkerUnavailable):
        finish(Job(redis, lambda looks: True))
