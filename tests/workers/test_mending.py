"""Keys that jobs share and that hold another type: moved aside, once, and never a right one."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ResponseError

from stoker.broker import keys, ledger, registry
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from workers.services import rebuilding
from workers.services.mending import SHARED, Mender, keys_of

QUEUE = keys.queue("m", "generate")
NAME = "w@here/1a2b3c4d"
RIGHT = SHARED | keys_of(QUEUE) | keys.types([keys.placed(QUEUE, NAME)])


def fill(redis: Any, key: str, kind: str) -> None:
    {
        "string": lambda: redis.set(key, "x"),
        "hash": lambda: redis.hset(key, "a", "b"),
        "list": lambda: redis.lpush(key, "x"),
        "set": lambda: redis.sadd(key, "x"),
        "zset": lambda: redis.zadd(key, {"x": 1.0}),
    }[kind]()
    redis.expire(key, 60)


@pytest.mark.parametrize("key", RIGHT)
def test_what_spoils_a_key_that_jobs_share_is_moved_aside_and_kept_for_a_while(redis: Any, key: str) -> None:
    redis.set(key, "x")
    mender = Mender(redis, lambda: [QUEUE], NAME)
    assert mender.round()
    assert not redis.exists(key)
    assert redis.get(keys.spoiled(key)) == b"x"
    assert 0 < redis.ttl(keys.spoiled(key)) <= keys.DEAD_TTL
    assert not mender.round()


def test_right_keys_and_keys_of_others_stay_as_they_are(redis: Any) -> None:
    for key, kind in RIGHT.items():
        fill(redis, key, kind)
    other = keys.ready(keys.queue("other", "embed"))
    fill(redis, other, "string")
    before = set(redis.keys())
    assert not Mender(redis, lambda: [QUEUE], NAME).round()
    assert set(redis.keys()) == before
    redis.delete(other)


def test_a_key_that_is_right_again_in_between_is_not_moved(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers see it wrong; the second comes when it was moved and written anew."""
    mender = Mender(redis, list, NAME)
    move = mender.move

    def late(key: str, found: str, kind: str) -> bool:
        redis.delete(key)
        fill(redis, key, kind)
        return move(key, found, kind)

    monkeypatch.setattr(mender, "move", late)
    fill(redis, keys.WORKERS, "string")
    assert not mender.round()
    assert redis.type(keys.WORKERS) == b"zset"


def test_every_key_that_is_mended_is_declared(redis: Any) -> None:
    assert all(keys.kind_of(key) for key in RIGHT)
    assert all(keys.kind_of(keys.spoiled(key)) for key in RIGHT)


def test_all_that_is_wrong_is_moved_at_once(redis: Any) -> None:
    for key in (keys.WORKERS, keys.MODELS, keys.ready(QUEUE)):
        redis.set(key, "x")
    assert Mender(redis, lambda: [QUEUE], NAME).round()
    assert not redis.exists(keys.WORKERS, keys.MODELS, keys.ready(QUEUE))


def test_the_list_of_adapters_of_a_served_model_is_mended_too(redis: Any) -> None:
    redis.set(keys.adapters("m"), "of another program", ex=60)
    assert Mender(redis, lambda: [QUEUE], NAME).round()
    assert redis.sadd(keys.adapters("m"), "style") == 1
    redis.delete(keys.adapters("m"))


def test_the_list_of_adapters_is_made_anew_of_the_records_that_are_there(redis: Any) -> None:
    for name in ("style", "tone"):
        registry.register(redis, "m", name, 1, {}, promote=True)
    registry.register(redis, "m-other", "alien", 1, {}, promote=True)
    for odd in (keys.adapter("m", "Bad Name"), keys.adapter("m", "typed")):
        redis.set(odd, "of another program", ex=60)
    write_over(redis, keys.adapters("m"))
    assert Mender(redis, lambda: [QUEUE], NAME).round()
    assert registry.names(redis.smembers(keys.adapters("m"))) == ["style", "tone"]
    assert redis.ttl(keys.adapters("m")) == -1
    assert redis.get(keys.spoiled(keys.adapters("m"))) == b"of another program"
    redis.flushall()


def test_a_user_who_may_not_scan_begins_the_list_of_adapters_anew(redis: Any, caplog: pytest.LogCaptureFixture) -> None:
    redis.set(keys.adapters("m"), "of another program", ex=60)
    redis.execute_command("ACL", "SETUSER", "default", "-scan")
    try:
        assert Mender(redis, lambda: [QUEUE], NAME).round()
    finally:
        redis.execute_command("ACL", "SETUSER", "default", "+@all")
    assert not redis.exists(keys.adapters("m"))
    assert "+scan" in caplog.text


def test_another_trouble_while_the_list_of_adapters_is_gathered_is_not_passed_over(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the key stays as it is: a list that begins anew would lose adapters that a later look finds."""
    write_over(redis, keys.adapters("m"))

    def loading(**_: object) -> None:
        raise ResponseError("LOADING the broker reads its file")

    monkeypatch.setattr(redis, "scan_iter", loading)
    with pytest.raises(ResponseError, match="LOADING"):
        Mender(redis, lambda: [QUEUE], NAME).round()
    assert redis.get(keys.adapters("m")) == b"of another program"


def write_over(redis: Any, key: str) -> None:
    redis.delete(key)
    redis.set(key, "of another program")


def submit(redis: Any, *job_ids: str) -> None:
    for job_id in job_ids:
        ledger.submit(redis, job_id, job_record(generate_request("m", "x", 0, {}), job_id))


def in_no_order(redis: Any) -> None:
    for priority in range(ledger.PRIORITIES):
        redis.delete(keys.backlog(QUEUE, priority))
    redis.delete(keys.ready(QUEUE), keys.dispatched(QUEUE), keys.turns(QUEUE))


@pytest.mark.parametrize("also_lost", [["no other key"], [keys.sizes(QUEUE)]], ids=["alone", "with the sizes"])
def test_the_set_of_open_jobs_is_made_anew_of_what_other_keys_know(redis: Any, also_lost: list[str]) -> None:
    jobs = [f"job-{number}" for number in range(30)]
    submit(redis, *jobs)
    before = redis.zrange(keys.open_jobs(QUEUE), 0, -1, withscores=True)
    # Neither counts: one has no record, the other's is another program's.
    redis.hset(keys.job("evil"), mapping={"queue": QUEUE, "message": "x", "submitted": "nan"})
    redis.expire(keys.job("evil"), 60)
    redis.zadd(keys.dispatched(QUEUE), {"ghost": 1.0, "evil": 1.0, b"\xff": 1.0})
    redis.delete(*also_lost)
    write_over(redis, keys.open_jobs(QUEUE))
    assert Mender(redis, lambda: [QUEUE], NAME).round()
    assert redis.zrange(keys.open_jobs(QUEUE), 0, -1, withscores=True) == before
    assert 0 < redis.ttl(keys.open_jobs(QUEUE)) <= keys.PENDING_TTL


def test_jobs_whose_orders_are_lost_behind_their_set_wait_again(redis: Any) -> None:
    submit(redis, "job")
    write_over(redis, keys.open_jobs(QUEUE))
    Mender(redis, lambda: [QUEUE], NAME).round()
    in_no_order(redis)
    for _ in range(2):
        ledger.recover(redis, QUEUE, -1)
    assert redis.llen(keys.ready(QUEUE)) == 1
    assert ledger.claim(redis, "job", QUEUE, "token", "job#1", "w").state == "run"


@pytest.mark.parametrize("key", keys_of(QUEUE))
def test_a_cancel_that_a_wrong_key_stops_changes_nothing_and_counts_once_it_is_mended(redis: Any, key: str) -> None:
    """A job that had left one order, and could not leave the next, would wait in none."""
    submit(redis, *(f"job-{number}" for number in range(30)))
    last = "job-29"
    write_over(redis, key)
    before = {name: redis.dump(name) for name in redis.scan_iter()}
    try:
        ledger.cancel(redis, last, QUEUE)
    except ResponseError:
        assert {name: redis.dump(name) for name in redis.scan_iter()} == before
        assert redis.type(key) == b"string"
        assert Mender(redis, lambda: [QUEUE], NAME).round()
        assert ledger.cancel(redis, last, QUEUE) == "cancelled"
    assert not redis.exists(keys.open_jobs(QUEUE)) or redis.zscore(keys.open_jobs(QUEUE), last) is None
    redis.flushall()


@pytest.mark.parametrize("queue", ["stoker.m.generate", "stoker.m.embed.v2", "stoker.qwen2.5-0.5b.train"])
def test_a_queue_says_its_model(queue: str) -> None:
    assert keys.model_of(queue) in ("m", "qwen2.5-0.5b")


def test_open_jobs_are_gathered_of_every_priority_and_however_many_there_are(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "AT_ONCE", 2)
    jobs = {f"job-{number}": number for number in range(ledger.PRIORITIES)}
    for job_id, priority in jobs.items():
        request = generate_request("m", "x", 0, {"priority": priority})
        ledger.submit(redis, job_id, job_record(request, job_id))
    redis.delete(keys.dispatched(QUEUE), keys.sizes(QUEUE))
    for job_id, priority in jobs.items():
        redis.zadd(keys.backlog(QUEUE, priority), {job_id: 1.0})
        redis.expire(keys.backlog(QUEUE, priority), 60)
    redis.set(keys.sizes(QUEUE), "of another program", ex=60)
    assert set(rebuilding.gathered(redis, keys.open_jobs(QUEUE))) == set(jobs)
