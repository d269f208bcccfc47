"""The janitor: one worker at a time looks for lost messages, and one thing that cannot be read hides nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import NoPermissionError, ReadOnlyError, ResponseError

from stoker.broker import keys, ledger
from stoker.broker.ledger.replies import recovered
from stoker.client.submission import job_record
from stoker.contract import CONTRACT, GenerateRequest, ModelCard
from workers.services.janitor import Janitor


class Ledger:
    """Of the ledger only what a round asks: `lost` says what it finds in a queue, or raises."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lost: Callable[[str], tuple[str, ...]] = lambda queue: ()

    def recover(self, redis: Any, queue: str, older_than: float) -> tuple[str, ...]:
        self.asked.append(queue)
        return self.lost(queue)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    made = Ledger()
    monkeypatch.setattr(ledger, "recover", made.recover)
    return made


def worker(redis: Any, name: str = "w@here", lease: int = 3) -> Janitor:
    runtime: Any = SimpleNamespace(redis=redis, name=name, settings=SimpleNamespace(lease=lease))
    return Janitor(runtime)


def card(model: str, *kinds: str, contract: int = CONTRACT, seen: float = 0.0) -> str:
    return ModelCard(
        model=model, architecture="a", kinds=kinds, context=1, parameters=1, contract=contract, seen=seen
    ).model_dump_json()


def say(redis: Any, cards: dict[str, str | bytes]) -> None:
    redis.hset(keys.MODELS, mapping=cards)
    redis.expire(keys.MODELS, keys.MODEL_TTL)


def test_one_worker_does_the_round_and_the_others_do_not(redis: Any, looks: Ledger) -> None:
    say(redis, {"m": card("m", "generate", "train")})
    for name in ("one", "two", "one"):
        worker(redis, name).round()
    assert looks.asked == [keys.queue("m", "generate"), keys.queue("m", "train")]
    assert redis.get(keys.JANITOR) == b"one"
    assert 0 < redis.ttl(keys.JANITOR) <= 6


def test_the_next_round_comes_when_the_turn_has_expired(redis: Any, looks: Ledger) -> None:
    say(redis, {"m": card("m", "embed")})
    worker(redis, "one").round()
    redis.delete(keys.JANITOR)
    worker(redis, "two").round()
    assert looks.asked == [keys.queue("m", "embed")] * 2


def test_only_jobs_older_than_two_leases_are_looked_for(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ages: list[float] = []

    def recover(redis: Any, queue: str, older_than: float) -> tuple[str, ...]:
        ages.append(older_than)
        return ()

    monkeypatch.setattr(ledger, "recover", recover)
    say(redis, {"m": card("m", "embed")})
    worker(redis, lease=7).round()
    assert ages == [14]


def test_queues_of_another_generation_are_left_to_its_own_workers(redis: Any, looks: Ledger) -> None:
    say(redis, {"m": card("m", "embed", contract=CONTRACT + 1)})
    worker(redis).round()
    assert looks.asked == []


@pytest.mark.parametrize("garbage", [b"garbage", b"{}", b"[]", b"\xff", b"[" * 20_000, b'{"model": 1}'])
def test_a_card_that_cannot_be_read_hides_no_other(redis: Any, looks: Ledger, garbage: bytes) -> None:
    say(redis, {"evil": garbage, "m": card("m", "embed")})
    worker(redis).round()
    assert looks.asked == [keys.queue("m", "embed")]


def test_a_queue_that_cannot_be_looked_at_keeps_no_other_from_it(
    redis: Any, looks: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(queue: str) -> tuple[str, ...]:
        if "train" in queue:
            raise ResponseError("WRONGTYPE Operation")
        return recovered([b"job", b"\xff"])

    looks.lost = lost
    say(redis, {"m": card("m", "train", "embed")})
    worker(redis).round()
    assert looks.asked == [keys.queue("m", "train"), keys.queue("m", "embed")]
    assert f"lost messages of {keys.queue('m', 'train')} cannot be looked for" in caplog.text
    assert "job job: its message was lost" in caplog.text


def test_dead_letters_that_are_older_than_they_are_kept_go(redis: Any, looks: Ledger) -> None:
    old = {"history": [{"worker": "w", "time": 1.0}], "kind": "generate", "model": "m", "request": "", "client": "c"}
    redis.hset(keys.DEAD, mapping={"old": json.dumps(old), "spoiled": "garbage"})
    say(redis, {"m": card("m", "embed")})
    worker(redis).round()
    assert redis.hkeys(keys.DEAD) == [b"spoiled"]
    assert 0 < redis.ttl(keys.DEAD) <= keys.DEAD_TTL


def test_dead_letters_that_cannot_be_looked_at_keep_no_queue_from_it(
    redis: Any, looks: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    redis.set(keys.DEAD, "garbage", ex=60)
    say(redis, {"m": card("m", "embed")})
    worker(redis).round()
    assert looks.asked == [keys.queue("m", "embed")]
    assert "old dead letters cannot be looked for" in caplog.text


def test_nothing_is_noted_of_vectors_that_expired_however_many_there_are(redis: Any, looks: Ledger) -> None:
    ids = [f"job-{number}" for number in range(2500)]
    redis.zadd(keys.VECTORS_UNFETCHED, {**dict.fromkeys(ids, 1.0), "kept": 2**40})
    redis.hset(keys.VECTORS_SIZES, mapping={**dict.fromkeys(ids, 10), "kept": 10, ":sum": 25010})
    for key in (keys.VECTORS_UNFETCHED, keys.VECTORS_SIZES):
        redis.expire(key, 60)
    worker(redis).round()
    assert redis.zrange(keys.VECTORS_UNFETCHED, 0, -1) == [b"kept"]
    assert redis.hgetall(keys.VECTORS_SIZES) == {b"kept": b"10", b":sum": b"10"}


@pytest.mark.parametrize("key", ["stoker:janitor", "stoker:unacked_mutex"])
def test_a_turn_that_never_expires_is_nobodys(redis: Any, looks: Ledger, key: str) -> None:
    redis.hset(key, "a", "b")
    say(redis, {"m": card("m", "embed")})
    worker(redis).round()
    assert looks.asked == [keys.queue("m", "embed")]
    assert redis.ttl(key) != -1


def test_a_model_that_nobody_has_served_for_its_time_is_looked_at_no_more_and_forgotten(
    redis: Any, looks: Ledger
) -> None:
    oldest = redis.time()[0] - keys.MODEL_TTL
    cards = {"old": card("old", "embed", seen=oldest - 1), "other": card("other", "embed", contract=0, seen=oldest - 1)}
    say(redis, {**cards, "m": card("m", "embed", seen=oldest + 60)})
    worker(redis).round()
    assert redis.hkeys(keys.MODELS) == [b"m"]
    assert looks.asked == [keys.queue("m", "embed")]


def test_a_lost_message_waits_again(redis: Any) -> None:
    """With the ledger itself."""
    from stoker.client.requests import generate_request
    from stoker.client.submission import job_record

    queue = keys.queue("m", "generate")
    ledger.submit(redis, "job", job_record(generate_request("m", "x", 0, {}), "job"))
    redis.delete(keys.ready(queue))
    say(redis, {"m": card("m", "generate")})
    redis.zadd(keys.dispatched(queue), {"job": 1.0})
    worker(redis).round()
    assert redis.llen(keys.ready(queue)) == 1


def test_a_round_looks_as_often_as_all_jobs_that_run_need(
    redis: Any, looks: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "LOOKED_AT", 3)
    queue = keys.queue("m", "embed")
    redis.zadd(keys.dispatched(queue), {f"job-{number}": 1.0 for number in range(7)})
    redis.expire(keys.dispatched(queue), 60)
    say(redis, {"m": card("m", "embed")})
    worker(redis).round()
    assert looks.asked == 3 * [queue]


def test_a_held_message_without_a_lease_gets_one_and_the_others_keep_theirs(redis: Any, looks: Ledger) -> None:
    redis.hset(keys.UNACKED, mapping={"kept#1": "x", "lost#1": "x"})
    redis.zadd(keys.LEASES, {"kept#1": 5.0})
    before = redis.time()[0]
    worker(redis).round()
    assert redis.zscore(keys.LEASES, "kept#1") == 5.0
    assert before <= redis.zscore(keys.LEASES, "lost#1") <= redis.time()[0] + 1
    assert redis.zcard(keys.LEASES) == 2


def test_letters_that_another_program_gave_no_end_go_in_their_time(redis: Any, looks: Ledger) -> None:
    redis.hset(keys.DEAD, "odd", "{}")
    worker(redis).round()
    assert keys.DEAD_TTL - 5 < redis.ttl(keys.DEAD) <= keys.DEAD_TTL
    redis.expire(keys.DEAD, 100)
    redis.delete(keys.JANITOR)
    worker(redis).round()
    assert redis.ttl(keys.DEAD) <= 100, "letters that have an end keep it"


def test_jobs_of_a_model_that_nobody_holds_any_more_end_at_the_next_round(redis: Any) -> None:
    gone = ModelCard.model_validate_json(card("m", "generate")).model_copy(update={"gone": "it was unloaded."})
    say(redis, {"m": gone.model_dump_json()})
    request = GenerateRequest(model="m", prompt="x")
    ledger.submit(redis, "job", job_record(request, "job"))
    settings, engine = SimpleNamespace(lease=3), SimpleNamespace(models={})
    runtime: Any = SimpleNamespace(redis=redis, name="w@here", settings=settings, engine=engine)
    Janitor(runtime).round()
    assert "it was unloaded." in redis.get(keys.result("job")).decode()


def test_a_round_looks_at_the_brokers_memory_too(redis: Any, looks: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        worker(redis).round()
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
    assert "maxmemory-policy allkeys-lru" in caplog.text


@pytest.mark.parametrize(
    "refusal", [NoPermissionError("this user has no permissions"), ResponseError("unknown command 'INFO'")]
)
def test_lost_messages_are_found_where_a_worker_may_not_ask_for_the_brokers_memory(
    redis: Any, looks: Ledger, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    def refused(section: str) -> dict[str, Any]:
        raise refusal

    monkeypatch.setattr(redis, "info", refused)
    say(redis, {"m": card("m", "embed")})
    worker(redis).round()
    assert looks.asked == [keys.queue("m", "embed")]


def test_a_broker_that_cannot_answer_for_its_memory_now_ends_the_round(
    redis: Any, looks: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(section: str) -> dict[str, Any]:
        raise ReadOnlyError("READONLY")

    monkeypatch.setattr(redis, "info", away)
    with pytest.raises(ReadOnlyError):
        worker(redis).round()
    assert looks.asked == []


def test_a_model_whose_jobs_cannot_be_ended_keeps_no_other_from_its_round(
    redis: Any, looks: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    gone = ModelCard.model_validate_json(card("gone", "embed")).model_copy(update={"gone": "it was unloaded."})
    redis.set(keys.open_jobs(keys.queue("gone", "embed")), "another program's", ex=60)
    say(redis, {"gone": gone.model_dump_json()})
    say(redis, {"m": card("m", "embed")})
    settings, engine = SimpleNamespace(lease=3), SimpleNamespace(models={})
    runtime: Any = SimpleNamespace(redis=redis, name="w@here", settings=settings, engine=engine)
    Janitor(runtime).round()
    assert looks.asked == [keys.queue("gone", "embed"), keys.queue("m", "embed")]
    assert "jobs of gone, which nobody holds any more, cannot be ended: WRONGTYPE" in caplog.text


def test_a_broker_that_goes_away_meanwhile_ends_the_round(redis: Any, looks: Ledger) -> None:
    """It is no trouble of the one queue that was looked at."""

    def away(queue: str) -> tuple[str, ...]:
        raise ReadOnlyError("You can't write against a read only replica.")

    looks.lost = away
    say(redis, {"m": card("m", "generate", "train")})
    with pytest.raises(ReadOnlyError):
        worker(redis).round()
    assert looks.asked == [keys.queue("m", "generate")]
