"""Records, orders and registries that another program wrote over: each hurts its own job, which ends with an error, and
nothing of it is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from redis.exceptions import ResponseError

from stoker.broker import keys, ledger, registry
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.broker.outcome import JobStatus, Outcome
from stoker.contract.kinds import READY
from stoker.errors import JobFailed
from stoker.settings import Settings
from tests.leaks import open_work
from tests.stoker.test_ledger import QUEUE, claim, complete, record, submit, take, take_all
from tests.thorough import in_turn

#: What is no number that orders or counts, and what is one that no script gave out.
GARBAGE = ("", "abc", "nan", "inf", "-inf", "1e400", "-1", "5.5", "{}", "0x10", "9" * 30, b"\xff\xfe")
TYPES = ("string", "list", "set", "zset", "stream")


def overwrite(redis: Any, key: str, kind: str) -> None:
    redis.delete(key)
    {
        "string": lambda: redis.set(key, "x"),
        "list": lambda: redis.rpush(key, "x"),
        "set": lambda: redis.sadd(key, "x"),
        "zset": lambda: redis.zadd(key, {"x": 1}),
        "stream": lambda: redis.xadd(key, {"x": "x"}),
    }[kind]()
    redis.expire(key, 60)


def failed(redis: Any, job_id: str) -> bool:
    """Whether who waits for the job gets an error that names the record's key."""
    outcome = Outcome.parse(redis.get(keys.result(job_id)))
    if outcome is None:
        return False
    with pytest.raises(JobFailed, match=f"{keys.job(job_id)} .*Something else than Stoker wrote there"):
        outcome.unwrap(job_id)
    return True


def run_all(redis: Any) -> None:
    """Run what can be run, as a worker and its janitor do."""
    for _ in range(3):
        ledger.recover(redis, QUEUE, -1)
        for job_id in take_all(redis):
            assert ledger.complete(redis, job_id, QUEUE, f"token-{job_id}", ledger.success(job_id, {}))


@pytest.mark.parametrize(
    ("value", "field"), in_turn([None, *GARBAGE], ["priority", "submitted", "turn", "message", "sent"])
)
def test_a_record_with_a_wrong_field_ends_its_own_job_and_no_other(redis: Any, field: str, value: Any) -> None:
    for number in range(READY + 4):
        submit(redis, f"job-{number}")
    bad = f"job-{READY + 1}"
    redis.hdel(keys.job(bad), field) if value is None else redis.hset(keys.job(bad), field, value)
    run_all(redis)
    for number in range(READY + 4):
        outcome = Outcome.parse(redis.get(keys.result(f"job-{number}")))
        assert outcome is not None, f"job-{number} has not ended"
        assert outcome.status is JobStatus.DONE or (f"job-{number}" == bad and failed(redis, bad))
    submit(redis, "last")
    run_all(redis)
    assert open_work(redis) == []


@pytest.mark.parametrize("kind", TYPES)
def test_a_record_of_another_type_ends_its_own_job_and_no_other(redis: Any, kind: str) -> None:
    for number in range(READY + 4):
        submit(redis, f"job-{number}")
    overwrite(redis, keys.job(f"job-{READY + 1}"), kind)
    run_all(redis)
    assert failed(redis, f"job-{READY + 1}")
    assert Outcome.parse(redis.get(keys.result(f"job-{READY + 2}"))) == Outcome(JobStatus.DONE, {})


def test_a_spoiled_record_in_the_backlog_ends_when_its_turn_comes(redis: Any) -> None:
    for number in range(READY + 2):
        submit(redis, f"job-{number}")
    redis.hdel(keys.job(f"job-{READY}"), Field.PRIORITY)
    with closing(redis.pubsub(ignore_subscribe_messages=True)) as waits:
        waits.subscribe(keys.result(f"job-{READY}"))
        waits.get_message(timeout=10)
        assert take_all(redis) == [f"job-{number}" for number in range(READY + 2) if number != READY]
        heard = waits.get_message(timeout=10)
    assert failed(redis, f"job-{READY}")
    assert heard["data"] == redis.get(keys.result(f"job-{READY}")), "who waits for it hears of it at once"
    assert redis.ttl(keys.job(f"job-{READY}")) <= keys.RESULT_TTL, "what is left of it goes with its result"


def test_a_job_whose_message_is_lost_and_whose_record_is_spoiled_ends_when_it_is_looked_for(redis: Any) -> None:
    submit(redis)
    submit(redis, "waits")
    redis.lpop(keys.ready(QUEUE))
    redis.rpop(keys.ready(QUEUE))
    redis.hdel(keys.job("job"), Field.PRIORITY)
    assert ledger.recover(redis, QUEUE, -1) == ("waits",)
    assert failed(redis, "job")
    assert take_all(redis) == ["waits"]


def test_a_record_that_is_spoiled_in_the_ready_list_ends_when_its_message_is_taken(redis: Any) -> None:
    submit(redis)
    redis.hdel(keys.job("job"), Field.SUBMITTED)
    redis.delete(keys.ready(QUEUE))
    assert ledger.claim(redis, "job", QUEUE, "token", "tag", "worker").state == "spoiled"
    assert failed(redis, "job")
    assert not redis.exists(keys.open_jobs(QUEUE), keys.dispatched(QUEUE), keys.sizes(QUEUE)), "it counts no more"
    assert ledger.claim(redis, "job", QUEUE, "token", "tag", "worker").state == "ended"


def test_a_record_that_only_pins_a_version_is_that_of_no_job(redis: Any) -> None:
    ledger.pin(redis, "job", 3)
    assert ledger.claim(redis, "job", QUEUE, "token", "tag", "worker").state == "unknown"
    assert ledger.cancel(redis, "job", QUEUE) == "unknown"
    assert not redis.exists(keys.result("job"))


@pytest.mark.parametrize("value", GARBAGE)
def test_the_count_of_a_queues_turns_may_be_anything(redis: Any, value: Any) -> None:
    for number in range(2 * READY):
        submit(redis, f"job-{number}", priority=number % 3)
    for field in ("served", "served:1", "now:1", "next:1:default"):
        redis.hset(keys.turns(QUEUE), field, value)
    redis.hset(keys.pace(QUEUE), mapping={"last": value, "interval": value})
    run_all(redis)
    assert open_work(redis) == []


def test_an_owner_ends_its_job_though_the_record_names_another_that_did(redis: Any) -> None:
    submit(redis)
    take(redis)
    redis.hset(keys.job("job"), mapping={Field.COMPLETED: "another", Field.ENDED: "1"})
    assert ledger.complete(redis, "job", QUEUE, "token-job", ledger.success("job", {}))
    assert not ledger.complete(redis, "job", QUEUE, "another-token", ledger.success("job", {}))


@pytest.mark.parametrize(
    "field", [Field.PRIORITY, Field.MINE, Field.BLOB, Field.MESSAGE, Field.SUBMITTED, Field.HISTORY]
)
def test_a_field_that_is_spoiled_while_a_job_runs_does_not_keep_it_from_its_end(redis: Any, field: Field) -> None:
    submit(redis)
    take(redis)
    redis.hset(keys.job("job"), field, "spoiled")
    assert ledger.complete(redis, "job", QUEUE, "token-job", ledger.success("job", {}))
    submit(redis, "next")
    run_all(redis)
    assert open_work(redis) == []


@pytest.mark.parametrize("field", [Field.SUBMITTED, Field.PRIORITY, Field.TURN, Field.WORKER])
def test_a_job_with_a_spoiled_record_can_be_cancelled(redis: Any, field: Field) -> None:
    submit(redis)
    take(redis)
    redis.hdel(keys.job("job"), field)
    assert ledger.cancel(redis, "job", QUEUE) == "cancelled"
    assert redis.zrange(keys.open_jobs(QUEUE), 0, -1) == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda redis: ledger.cancel(redis, "job", QUEUE),
        lambda redis: ledger.complete(redis, "job", QUEUE, "one", ledger.success("job", {})),
        lambda redis: ledger.release(redis, "job", QUEUE, "one"),
        lambda redis: ledger.dead_letter(redis, "job", QUEUE, "one"),
        lambda redis: ledger.count_out_of_memory(redis, "job", QUEUE, "one"),
        lambda redis: ledger.keep_part(redis, "job", QUEUE, "one", "a-1", b"a"),
        lambda redis: ledger.keep_manifest(redis, "job", QUEUE, "one", "{}", ()),
    ],
    ids=["cancel", "complete", "release", "dead_letter", "out_of_memory", "keep_part", "keep_manifest"],
)
def test_what_is_asked_of_a_job_whose_record_was_written_over_is_an_error_that_names_it_and_changes_nothing(
    redis: Any, broker: Settings, ask: Callable[[Any], object]
) -> None:
    submit(redis)
    claim(redis, "one")
    overwrite(redis, keys.job("job"), "list")
    before = set(redis.keys())
    # A worker calls functions, a client where there are none sends scripts.
    with closing(connect(broker, loads_functions=True)) as worker:
        for client in (redis, worker):
            with pytest.raises(ResponseError, match=f"the key {keys.job('job')} is a list, not a hash"):
                ask(client)
    assert set(redis.keys()) == before


def test_a_job_that_has_a_result_before_it_runs_is_left_nowhere_by_the_claim_of_its_message(redis: Any) -> None:
    submit(redis)
    redis.set(keys.result("job"), '{"status": "SUCCESS"}', ex=60)
    redis.delete(keys.ready(QUEUE))
    assert claim(redis, "one").state == "ended"
    assert not redis.exists(keys.open_jobs(QUEUE), keys.dispatched(QUEUE), keys.sizes(QUEUE))
    assert redis.get(keys.result("job")) == b'{"status": "SUCCESS"}'


@pytest.mark.parametrize("kind", TYPES)
def test_a_job_whose_record_was_written_over_is_abandoned_with_an_error(redis: Any, kind: str) -> None:
    submit(redis)
    take(redis)
    overwrite(redis, keys.job("job"), kind)
    outcome = ledger.failure("job", JobFailed("its record is gone"))
    assert ledger.abandon(redis, "job", QUEUE, "token-job", outcome)
    assert not ledger.abandon(redis, "job", QUEUE, "token-job", outcome), "once"
    submit(redis, "next")
    run_all(redis)
    assert open_work(redis) == []


def test_a_job_that_its_owner_has_abandoned_is_not_completed_by_it(redis: Any) -> None:
    submit(redis)
    claim(redis, "token")
    failed = ledger.failure("job", JobFailed("the record is no record"))
    assert ledger.abandon(redis, "job", QUEUE, "token", failed)
    assert complete(redis, "token") == 0
    assert json.loads(redis.get(keys.result("job")))["status"] == "FAILURE"


def test_a_job_of_another_owner_is_not_abandoned(redis: Any) -> None:
    submit(redis)
    take(redis)
    assert not ledger.abandon(redis, "job", QUEUE, "another", ledger.failure("job", JobFailed("x")))
    assert not redis.exists(keys.result("job"))


def test_a_job_that_waits_again_is_not_abandoned_by_the_owner_that_it_was_taken_from(redis: Any) -> None:
    submit(redis)
    take(redis)
    assert ledger.recover(redis, QUEUE, -1) == ("job",)
    assert not ledger.abandon(redis, "job", QUEUE, "token-job", ledger.failure("job", JobFailed("x")))
    assert take_all(redis) == ["job"]


def test_a_job_whose_record_names_another_priority_runs_once(redis: Any) -> None:
    names = [f"job-{number}" for number in range(READY + 3)]
    for name in names:
        submit(redis, name)
    redis.hset(keys.job(names[READY]), Field.PRIORITY, "0")
    run_all(redis)
    for name in names:
        assert Outcome.parse(redis.get(keys.result(name))) == Outcome(JobStatus.DONE, {})
    assert open_work(redis) == []


def test_an_id_that_another_program_put_into_several_backlogs_leaves_them_all_when_its_job_ends(redis: Any) -> None:
    submit(redis)
    claim(redis, "one")
    for priority in (0, 4, 9):
        redis.zadd(keys.backlog(QUEUE, priority), {"job": 1, "other": 2})
        redis.expire(keys.backlog(QUEUE, priority), 60)
    assert complete(redis, "one")
    assert [redis.zscore(keys.backlog(QUEUE, priority), "job") for priority in (0, 4, 9)] == [None] * 3


def test_jobs_whose_order_was_written_over_wait_again(redis: Any) -> None:
    names = [f"job-{number}" for number in range(2 * READY)]
    for name in names:
        submit(redis, name)
    redis.delete(keys.backlog(QUEUE, 5), keys.dispatched(QUEUE), keys.ready(QUEUE))
    ledger.recover(redis, QUEUE, -1)
    assert sorted(take_all(redis)) == sorted(names)


def test_a_job_that_was_dispatched_in_the_future_is_found_when_its_message_is_lost(redis: Any) -> None:
    submit(redis)
    redis.zadd(keys.dispatched(QUEUE), {"job": 1e18, "ghost": float("inf")})
    redis.delete(keys.ready(QUEUE))
    ledger.recover(redis, QUEUE, -1)
    assert take_all(redis) == ["job"]
    assert redis.zscore(keys.dispatched(QUEUE), "ghost") is None


def test_ids_without_a_job_leave_the_set_of_open_jobs_and_their_clients(redis: Any) -> None:
    submit(redis)
    seconds = redis.time()[0]
    for key in (keys.open_jobs(QUEUE), keys.client("default", QUEUE)):
        redis.zadd(key, {"ghost": seconds - 5, b"\xff": seconds - 4})
    ledger.recover(redis, QUEUE, 0)
    assert redis.zrange(keys.open_jobs(QUEUE), 0, -1) == [b"job"]
    submit(redis, "next")
    assert redis.zrange(keys.client("default", QUEUE), 0, -1) == [b"job", b"next"]


def test_an_input_of_another_type_is_no_reason_to_refuse_its_job(redis: Any) -> None:
    key = keys.blob("dataset:job")
    redis.rpush(key, "x")
    assert ledger.submit(redis, "job", record() | {"blob": key}).state == "new"
    assert 0 < redis.ttl(key) <= keys.PENDING_TTL


@pytest.mark.parametrize("value", [*GARBAGE, "[1", "[[]]", '["x", 2, {"a": 1}]', "7"])
def test_what_no_release_wrote_into_an_adapters_hash_keeps_no_version_from_serving(redis: Any, value: Any) -> None:
    key = keys.adapter("toy", "style")
    redis.hset(key, mapping={"next": value, "history": value})
    number = ledger.allocate(redis, "toy", "style", "job", 1)
    assert number.isdecimal()
    redis.expire(keys.job("job"), 60)
    for version in (1, 2):
        registry.register(redis, "toy", "style", version, {"rank": 2}, promote=True)
    assert registry.parse("toy", "style", redis.hgetall(key)).serving == 2
    assert registry.change(redis, "toy", "rollback", "style", None) == b"1"
    assert json.loads(redis.hget(key, "history")) in ([], ["2"], ["7"])


@pytest.mark.parametrize("key", [keys.ready(QUEUE), keys.backlog(QUEUE, 5), keys.dispatched(QUEUE), keys.turns(QUEUE)])
def test_an_input_that_was_sent_with_a_job_which_is_refused_is_not_left(redis: Any, key: str) -> None:
    redis.set(key, "x")
    blob = keys.blob("dataset:job")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        ledger.submit(redis, "job", record() | {"blob": blob}, b"lines")
    assert not redis.exists(blob, keys.job("job"))
    redis.delete(key)
