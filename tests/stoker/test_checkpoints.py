"""The checkpoints of training runs in the broker: written by a job's owner alone, counted, swept, gone with the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from stoker.broker import keys, ledger, policy
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.broker.ledger.replies import ManifestState
from stoker.settings import Settings
from tests.stoker.test_ledger import QUEUE, record, submit, take_all

KEY = keys.checkpoint("job")


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    with closing(connect(broker)) as client:
        submit(client, "job")
        take_all(client)
        yield client


def name(data: bytes) -> str:
    return f"{data.hex():0>64}-{len(data)}"


def part(redis: Any, data: bytes, token: str = "token-job") -> Any:
    return ledger.keep_part(redis, "job", QUEUE, token, name(data), data)


def manifest(redis: Any, text: str, *parts: bytes, token: str = "token-job") -> ManifestState:
    return ledger.keep_manifest(redis, "job", QUEUE, token, text, map(name, parts))


def fields(redis: Any) -> set[str]:
    return {field.decode() for field in redis.hkeys(KEY)}


def counted(redis: Any) -> int:
    return int(redis.hget(keys.sizes(QUEUE), "job"))


def test_a_manifest_keeps_the_parts_that_it_needs_and_sweeps_the_others(redis: Any) -> None:
    for data in (b"one", b"two"):
        assert part(redis, data).there
    assert manifest(redis, "first", b"one", b"two") is ManifestState.KEPT
    part(redis, b"three")
    part(redis, b"left by an upload that was cut")
    assert manifest(redis, "second", b"two", b"three") is ManifestState.KEPT
    assert fields(redis) == {"manifest", "bytes", name(b"two"), name(b"three")}
    assert redis.hget(KEY, "manifest") == b"second"


def test_a_manifest_whose_parts_are_not_there_is_not_kept(redis: Any) -> None:
    part(redis, b"one")
    manifest(redis, "first", b"one")
    before = redis.hgetall(KEY)
    assert manifest(redis, "second", b"one", b"nowhere") is ManifestState.LOST
    assert redis.hgetall(KEY) == before


def test_what_is_kept_counts_as_bytes_of_its_job_once_and_no_longer_than_it_is_there(redis: Any) -> None:
    bare = counted(redis)
    for _ in range(2):
        part(redis, b"x" * 100)
    part(redis, b"y" * 50)
    assert counted(redis) == bare + 150
    for _ in range(2):
        manifest(redis, "manifest", b"x" * 100)
        assert counted(redis) == bare + 100 + len("manifest")
        assert int(redis.hget(KEY, "bytes")) == 100 + len("manifest")
    assert int(redis.hget(keys.sizes(QUEUE), ":sum")) == counted(redis)


def test_checkpoints_take_no_more_than_half_of_what_the_jobs_of_a_queue_may(redis: Any) -> None:
    policy.decide(redis, "queue_bytes", 2 * counted(redis) + 200)
    assert part(redis, b"x" * 100).there
    full = part(redis, b"y")
    assert (full.there, full.fenced, full.bytes, full.limit) == (False, False, counted(redis), counted(redis))
    assert fields(redis) == {"bytes", name(b"x" * 100)}


def replaced(redis: Any) -> None:
    redis.hset(keys.job("job"), Field.TOKEN, "another")


def released(redis: Any) -> None:
    ledger.release(redis, "job", QUEUE, "token-job")


def completed(redis: Any) -> None:
    ledger.complete(redis, "job", QUEUE, "token-job", ledger.success("job", {}))


def cancelled(redis: Any) -> None:
    redis.delete(keys.worker("w"))
    assert ledger.cancel(redis, "job", QUEUE) == "cancelled"


def forgotten(redis: Any) -> None:
    redis.delete(keys.job("job"))


@pytest.mark.parametrize("lose", [replaced, released, completed, cancelled, forgotten])
def test_who_does_not_own_the_job_any_more_writes_nothing(redis: Any, lose: Callable[[Any], None]) -> None:
    part(redis, b"one")
    lose(redis)
    before = redis.hgetall(KEY)
    assert part(redis, b"two").fenced
    assert manifest(redis, "late", b"one") is ManifestState.FENCED
    assert redis.hgetall(KEY) == before


@pytest.mark.parametrize("end", [completed, cancelled])
def test_they_go_with_the_end_of_their_run(redis: Any, end: Callable[[Any], None]) -> None:
    part(redis, b"one")
    manifest(redis, "first", b"one")
    end(redis)
    assert not redis.exists(KEY)
    assert not redis.exists(keys.sizes(QUEUE))


def test_each_write_lets_them_live_as_long_as_a_job_may(redis: Any) -> None:
    for write in (lambda: part(redis, b"one"), lambda: manifest(redis, "first", b"one")):
        write()
        assert keys.PENDING_TTL - 10 <= redis.ttl(KEY) <= keys.PENDING_TTL
        redis.expire(KEY, 60)


def test_those_of_a_dead_letter_stay_for_its_retry_and_count_again(redis: Any) -> None:
    own = counted(redis)
    part(redis, b"x" * 100)
    manifest(redis, "first", b"x" * 100)
    ledger.dead_letter(redis, "job", QUEUE, "token-job", "w", "a full disk")
    completed(redis)
    assert redis.hget(KEY, "manifest") == b"first"
    assert keys.DEAD_TTL - 10 <= redis.ttl(KEY) <= keys.DEAD_TTL
    assert ledger.submit(redis, "job", record("job"), revive=True).state == "new"
    assert counted(redis) == own + 100 + len("first")
    assert take_all(redis) == ["job"]
    part(redis, b"y" * 10)
    assert counted(redis) == own + 100 + len("first") + 10
    completed(redis)
    assert not redis.exists(KEY)


def test_another_type_in_their_place_hinders_neither_the_end_nor_a_submission(redis: Any) -> None:
    redis.set(KEY, "of another program", ex=60)
    completed(redis)
    assert not redis.exists(KEY)
    redis.set(keys.checkpoint("next"), "of another program", ex=60)
    assert submit(redis, "next") == "new"
