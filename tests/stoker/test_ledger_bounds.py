"""What others write into the ledger's keys, and what a queue may hold in bytes: each bad value hurts itself alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ResponseError

from stoker import AsyncClient, Client
from stoker.broker import keys, ledger, policy
from stoker.broker.connection import connect_async
from stoker.broker.ledger.record import Field
from stoker.broker.ledger.transitions import TRANSITIONS
from stoker.client.submission import Submission
from stoker.contract import GenerateRequest
from stoker.errors import BrokerUnavailable, InvalidRequest, QueueFull
from stoker.settings import Settings
from tests.stoker.test_ledger import QUEUE, claim, complete, record, submit, take_all

#: What `stoker jobs policy` never writes.
UNDECIDED = ("0", "-1", "nan", "inf", "1e999", "1e3", "abc", "1.5", " 7", "", "9" * 30)


def sizes(redis: Any) -> dict[str, int]:
    return {of.decode(): int(size) for of, size in redis.hgetall(keys.sizes(QUEUE)).items()}


def submit_input(redis: Any, job_id: str, data: bytes) -> Any:
    return ledger.submit(redis, job_id, record(job_id) | {"blob": keys.blob(f"dataset:{job_id}")}, data)


# Bytes


def test_a_queue_takes_no_more_bytes_than_the_policy_says_and_says_how_many_there_are(redis: Any) -> None:
    policy.decide(redis, "queue_bytes", 5000)
    first = submit_input(redis, "a", b"x" * 2000)
    held = sizes(redis)["a"]
    assert first.state == "new"
    assert 2000 < held < 4000, "the record counts too"
    full = submit_input(redis, "b", b"x" * 3000)
    assert (full.state, full.depth, full.limit) == ("bytes_full", held, 5000)
    assert full.wait >= 1
    redis.hset(keys.pace(QUEUE), "interval", 100)
    redis.expire(keys.pace(QUEUE), 60)
    waits = [submit_input(redis, "b", b"x" * size).wait for size in (3000, 1500)]
    assert waits == [100, pytest.approx(100 * (held - 500) / held, abs=0.1)], "until so many bytes have ended"
    assert not redis.exists(keys.job("b"), keys.blob("dataset:b")), "nothing of it was kept"
    assert take_all(redis) == ["a"]
    ledger.complete(redis, "a", QUEUE, "token-a", ledger.success("a", {}))
    assert submit_input(redis, "b", b"x" * 3000).state == "new"


def test_a_job_may_be_as_large_as_all_of_a_queue_and_no_byte_larger(redis: Any) -> None:
    submit_input(redis, "a", b"x" * 2000)
    policy.decide(redis, "queue_bytes", sizes(redis)["a"])
    take_all(redis)
    ledger.complete(redis, "a", QUEUE, "token-a", ledger.success("a", {}))
    assert submit_input(redis, "b", b"x" * 2001).state == "too_large"
    assert submit_input(redis, "b", b"x" * 2000).state == "new"


def test_an_input_that_was_uploaded_before_counts(redis: Any) -> None:
    policy.decide(redis, "queue_bytes", 5000)
    redis.set(keys.blob("dataset:a"), b"x" * 6000, ex=60)
    reply = submit_input(redis, "a", b"")
    assert (reply.state, reply.limit) == ("too_large", 5000)
    assert reply.depth > 6000
    redis.delete(keys.blob("dataset:a"))


def test_a_job_larger_than_all_of_a_queue_is_refused_for_good_and_a_full_queue_for_now(
    redis: Any, broker: Settings
) -> None:
    policy.decide(redis, "queue_bytes", 3000)
    request = GenerateRequest(model="toy", prompt="x" * 4000)
    large, small = (
        Submission(broker, request, "a"),
        Submission(broker, request.model_copy(update={"prompt": "x"}), "b"),
    )
    with pytest.raises(InvalidRequest, match=r"the job has \d+ bytes with its input; .* may have 3000.*queue_bytes"):
        large.pause(large.transition().on(redis))
    assert small.pause(small.transition().on(redis)) is None
    another = Submission(broker, request.model_copy(update={"prompt": "x" * 500}), "c")
    with pytest.raises(
        QueueFull, match=r"the jobs there have \d+ bytes and may have 3000. Nothing was sent"
    ) as refusal:
        another.pause(another.transition().on(redis))
    assert refusal.value.limit == 3000
    assert 0 < refusal.value.depth <= 3000


@pytest.mark.parametrize("way", ["complete", "cancel", "dead"])
def test_the_bytes_of_a_job_go_with_it(redis: Any, way: str) -> None:
    submit(redis)
    assert sizes(redis).keys() == {"job", ":sum"}
    assert 0 < redis.ttl(keys.sizes(QUEUE)) <= keys.PENDING_TTL
    if way == "cancel":
        ledger.cancel(redis, "job", QUEUE)
    else:
        claim(redis, "one")
        assert way == "complete" or not ledger.dead_letter(redis, "job", QUEUE, "one", "w", "full").fenced
        complete(redis, "one")
    assert not redis.exists(keys.sizes(QUEUE))


@pytest.mark.parametrize("value", ["nan", "abc", "-5", "1e300", ""])
def test_a_sum_of_bytes_that_is_none_stops_no_job(redis: Any, value: str) -> None:
    submit(redis)
    redis.hset(keys.sizes(QUEUE), ":sum", value)
    redis.hset(keys.sizes(QUEUE), "job", value)
    assert submit(redis, "next") == "new"
    claim(redis, "one")
    assert complete(redis, "one")


def test_bytes_that_are_left_of_jobs_which_are_gone_do_not_keep_the_first_one_out(redis: Any) -> None:
    policy.decide(redis, "queue_bytes", 5000)
    redis.hset(keys.sizes(QUEUE), mapping={":sum": 4999, "gone": 4999})
    assert submit(redis, "first") == "new"
    assert submit(redis, "second") == "bytes_full"


def test_the_bytes_of_jobs_that_went_with_their_records_are_swept(redis: Any) -> None:
    submit(redis)
    submit(redis, "gone")
    before = sizes(redis)
    redis.delete(keys.job("gone"))
    redis.zrem(keys.open_jobs(QUEUE), "gone")
    ledger.recover(redis, QUEUE, 3600)
    assert sizes(redis) == {"job": before["job"], ":sum": before["job"]}


# The policy


@pytest.mark.parametrize("value", UNDECIDED)
@pytest.mark.parametrize("name", ["queue_limit", "client_limit", "client_limit:default", "queue_bytes", "ageing"])
def test_a_policy_that_is_no_number_or_out_of_bounds_decides_nothing(redis: Any, name: str, value: str) -> None:
    redis.hset(keys.POLICY, name, value)
    reply = ledger.submit(redis, "job", record())
    assert (reply.state, reply.limit) == ("new", ledger.QUEUE_LIMIT)


@pytest.mark.parametrize("value", UNDECIDED)
def test_a_number_of_crashes_that_is_none_decides_nothing(redis: Any, value: str) -> None:
    redis.hset(keys.POLICY, "crashes", value)
    submit(redis)
    states = [claim(redis, str(number)).state for number in range(ledger.MAX_CRASHES + 1)]
    assert states == ["run"] * ledger.MAX_CRASHES + ["dead"]


@pytest.mark.parametrize("name", policy.RULES)
def test_the_scripts_take_what_the_command_takes_and_no_more(redis: Any, name: str) -> None:
    text = TRANSITIONS.submit.text
    prelude = text[: text.index("-- Waiting lifts a job")]
    asked = f"{prelude}\nbegin(KEYS, ARGV)\nreturn tostring(setting('{name}', -1))"
    most = policy.RULES[name].most
    names = [keys.job("x"), *["x"] * 7, keys.POLICY, *["x"] * 11]
    found = []
    for value in (1, most, most + 1):
        redis.hset(keys.POLICY, name, value)
        found.append(float(redis.eval(asked, len(names), *names, "x", keys.job(""), 1, 1, 8)))
    assert found == [1, most, -1]


@pytest.mark.parametrize(("decided", "lives"), [(59, keys.RESULT_TTL), (60, 60), (3600, 3600)])
@pytest.mark.parametrize("end", ["completed", "cancelled", "refused", "spoiled"])
def test_what_a_job_leaves_lives_as_long_as_the_policy_says_however_it_ended(
    redis: Any, end: str, decided: int, lives: int
) -> None:
    redis.hset(keys.POLICY, "result_seconds", decided)
    submit(redis)
    redis.xadd(keys.stream("job"), {"entry": "x"})
    redis.expire(keys.stream("job"), keys.RESULT_TTL)
    if end == "completed":
        claim(redis, "one")
        assert complete(redis, "one")
    elif end == "cancelled":
        assert ledger.cancel(redis, "job", QUEUE) == "cancelled"
    elif end == "refused":
        assert ledger.refuse(redis, "job", QUEUE, ledger.success("job", {}))
    else:
        redis.hdel(keys.job("job"), Field.TURN)
        assert claim(redis, "one").state == "spoiled"
    left = [keys.job("job"), keys.result("job"), *([keys.stream("job")] if end == "completed" else [])]
    assert [(lives - 5 <= redis.ttl(name) <= lives, name) for name in left] == [(True, name) for name in left]


# Keys of another type


def test_another_type_at_the_key_of_a_clients_jobs_is_moved_aside_by_the_next_submission(redis: Any) -> None:
    mine = keys.client("default", QUEUE)
    # Another program sets no expiry.
    redis.set(mine, "garbage")
    assert submit(redis) == "new"
    assert redis.zrange(mine, 0, -1) == [b"job"]
    assert redis.get(keys.spoiled(mine)) == b"garbage"
    assert keys.DEAD_TTL - 10 <= redis.ttl(keys.spoiled(mine)) <= keys.DEAD_TTL


def test_another_type_at_the_key_of_a_clients_jobs_holds_up_no_end(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    redis.set(keys.client("default", QUEUE), "garbage", ex=60)
    assert complete(redis, "one")
    assert not redis.exists(keys.open_jobs(QUEUE), keys.sizes(QUEUE))


SHARED = (
    *(keys.ready(QUEUE), keys.open_jobs(QUEUE), keys.dispatched(QUEUE), keys.turns(QUEUE), keys.sizes(QUEUE)),
    *(keys.backlog(QUEUE, 5), keys.POLICY),
)


@pytest.mark.parametrize("key", SHARED)
def test_a_submission_that_fails_leaves_no_job_that_would_never_run(redis: Any, key: str) -> None:
    redis.set(key, "garbage", ex=60)
    with pytest.raises(ResponseError, match=f"WRONGTYPE: the key {key} is a string, not a {keys.types([key])[key]}$"):
        submit(redis)
    redis.delete(key)
    assert submit(redis) == "new", "the same id, sent again, is a job"
    assert take_all(redis) == ["job"]


def test_both_clients_say_which_key_it_was_and_what_to_do(redis: Any, broker: Settings) -> None:
    said = rf"the key {keys.WORKERS} is a string, not a zset.*"
    redis.set(keys.WORKERS, "garbage", ex=60)
    with Client(settings=broker) as client, pytest.raises(BrokerUnavailable, match=said) as refusal:
        client.workers()
    assert "no answer" not in str(refusal.value)

    async def ask() -> None:
        async with AsyncClient(settings=broker) as asking:
            await asking.workers()

    with pytest.raises(BrokerUnavailable, match=said):
        asyncio.run(ask())


def test_an_error_names_the_keys_of_a_script_by_both_kinds_of_client(redis: Any, broker: Settings) -> None:
    redis.set(keys.open_jobs(QUEUE), "garbage", ex=60)

    async def send() -> None:
        client = connect_async(broker)
        try:
            await ledger.submission("job", record()).on_async(client)
        finally:
            await client.aclose()

    with pytest.raises(ResponseError, match=f"the key {keys.open_jobs(QUEUE)} is a string, not a zset"):
        asyncio.run(send())


def test_a_crowd_of_ids_without_a_job_fills_no_queue(redis: Any) -> None:
    policy.decide(redis, "queue_limit", 5)
    redis.zadd(keys.backlog(QUEUE, 5), {f"ghost{number}": number for number in range(50)})
    redis.expire(keys.backlog(QUEUE, 5), 60)
    assert submit(redis) == "new"
    assert take_all(redis) == ["job"]


# Keys that a record names


def test_a_record_that_names_the_input_of_another_job_neither_deletes_nor_renews_it(redis: Any) -> None:
    for other in (keys.blob("dataset:other:1:2:3"), keys.blob("vectors:other"), keys.job("other"), keys.POLICY):
        redis.delete(other)
        redis.set(other, "theirs", ex=500)
        if other == keys.POLICY:
            continue
        assert ledger.submit(redis, "thief", record("thief") | {"blob": other}, b"mine").state == "new"
        assert take_all(redis) == ["thief"]
        assert not ledger.dead_letter(redis, "thief", QUEUE, "token-thief", "w", "full").fenced
        redis.hset(keys.job("thief"), Field.BLOB, other)
        ledger.complete(redis, "thief", QUEUE, "token-thief", ledger.success("thief", {}))
        assert redis.get(other) == b"theirs"
        assert redis.ttl(other) <= 500
        redis.delete(keys.job("thief"), keys.result("thief"))
    redis.delete(keys.POLICY)


def test_a_record_that_names_another_set_as_its_clients_takes_nothing_from_it(redis: Any) -> None:
    submit(redis)
    redis.zadd(keys.LEASES, {"job": 1.0})
    redis.hset(keys.job("job"), Field.MINE, keys.LEASES)
    claim(redis, "one")
    assert complete(redis, "one")
    assert redis.zscore(keys.LEASES, "job") == 1.0
    redis.delete(keys.LEASES)
