"""Who has the beginning of a prompt, and when a job goes there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker.broker import keys, ledger
from stoker.broker.connection import connect
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.contract import CONTRACT, ModelCard, Presence
from stoker.settings import Settings
from tests.conftest import wait_until
from workers.beginnings import BLOCK, beginnings
from workers.services.placing import Placing

QUEUE = keys.queue("m", "generate")
NAMES = [f"{number:032x}" for number in range(1, 4)]
CARD = ModelCard(model="m", architecture="a", kinds=("generate",), context=1, parameters=1)
#: Name of a worker → a `Placing` as its process has it.
Place = Callable[..., Placing]


@pytest.fixture
def place(broker: Settings, redis: Any, tmp_path: Path) -> Place:
    def made(worker: str, home: str | None = None, **settings: Any) -> Placing:
        settings = {"home": tmp_path / (home or worker), "placement": 0.05, **settings}
        return Placing(broker.model_copy(update=settings), worker, redis)

    return made


def says(redis: Any, worker: str, held: int = 0, most: int = 4, *, stopping: bool = False, **card: Any) -> None:
    """The worker's presence: so many jobs held of so many."""
    presence = Presence(
        worker=worker, host="h", pid=1, device="cpu", started=0, time=0, adapters={}, memory_bytes=0,
        models=(CARD.model_copy(update=card),), lanes={"generate": (held, most)}, stopping=stopping,
    )  # fmt: skip
    redis.set(keys.worker(worker), presence.model_dump_json(), ex=keys.PRESENCE_TTL)
    redis.zadd(keys.WORKERS, {worker: 0})
    redis.expire(keys.WORKERS, 60)


def test_the_worker_that_has_the_longest_beginning_is_better(redis: Any, place: Place) -> None:
    here = place("here")
    assert here.better("m", NAMES) is None
    for worker, length in (("short", 1), ("long", 2)):
        says(redis, worker)
        place(worker).note(NAMES[:length])
    assert here.better("m", NAMES) == "long"
    here.note(NAMES[:1])
    assert here.better("m", NAMES) == "long", "it has more than this one"
    here.note(NAMES[:2])
    assert here.better("m", NAMES) is None, "it has no more than this one"
    assert all(0 < redis.ttl(keys.beginning(name)) <= keys.BEGINNING_TTL for name in NAMES[:2])


def test_of_those_that_have_as_much_the_one_with_most_room_is_better(redis: Any, place: Place) -> None:
    for worker, held in (("a", 3), ("b", 1), ("c", 2)):
        says(redis, worker, held)
        place(worker).note(NAMES)
    assert place("here").better("m", NAMES) == "b"


@pytest.mark.parametrize("held_by", ["full", "gone", "of another model", "unreadable"])
def test_a_worker_that_would_not_take_the_job_is_not_asked(redis: Any, place: Place, held_by: str) -> None:
    """The next shorter beginning counts then."""
    says(redis, "full", held=4)
    says(redis, "of another model", model="n")
    redis.set(keys.worker("unreadable"), b"\xff{", ex=keys.PRESENCE_TTL)
    place(held_by).note(NAMES)
    here = place("here")
    assert here.better("m", NAMES) is None
    says(redis, "short")
    place("short").note(NAMES[:1])
    assert here.better("m", NAMES) == "short"


def test_a_worker_that_is_gone_is_forgotten(redis: Any, place: Place) -> None:
    says(redis, "other")
    for worker in ("gone", "other"):
        place(worker).note(NAMES[:1])
    assert place("here").better("m", NAMES) == "other"
    assert [holder.split()[1] for holder in redis.smembers(keys.beginning(NAMES[0]))] == [b"other"]


@pytest.mark.parametrize(("disk", "expected"), [(4096, None), (0, "other")])
def test_workers_of_one_home_have_what_is_on_its_disk(
    redis: Any, place: Place, disk: int, expected: str | None
) -> None:
    says(redis, "other")
    place("other", "home", prefix_disk=disk).note(NAMES)
    assert place("here", "home", prefix_disk=disk).better("m", NAMES) == expected


def test_memory_is_that_of_the_other_workers_that_would_take_the_job(redis: Any, place: Place) -> None:
    here = place("here", placement=0)
    assert here.memories("m") == []
    says(redis, "here", kv_tokens=9)
    says(redis, "large", held=1, kv_tokens=8000)
    says(redis, "full", held=4, kv_tokens=4000)
    says(redis, "of a release that does not say it")
    says(redis, "of another model", model="n", kv_tokens=9)
    says(redis, "trains", kinds=("train",), kv_tokens=9)
    says(redis, "of another contract", contract=CONTRACT + 1, kv_tokens=9)
    says(redis, "ends", stopping=True, kv_tokens=9)
    redis.zadd(keys.WORKERS, {"gone": 0})
    assert sorted(here.memories("m")) == [
        ("full", 4000, 0), ("large", 8000, 3), ("of a release that does not say it", 0, 4),
    ]  # fmt: skip


def test_a_wait_of_nothing_turns_it_off(redis: Any, place: Place) -> None:
    says(redis, "other")
    place("other").note(NAMES)
    request = generate_request("m", "x" * BLOCK, 0, {})
    assert place("here").names(request) == beginnings(request) != []
    assert place("here", placement=0).names(request) == []


def test_what_another_program_wrote_hurts_no_job(redis: Any, place: Place) -> None:
    says(redis, "other")
    redis.set(keys.beginning(NAMES[2]), "x", ex=60)
    redis.sadd(keys.beginning(NAMES[1]), b"\xff", "no holder")
    redis.expire(keys.beginning(NAMES[1]), 60)
    place("other").note(NAMES)
    assert place("here").better("m", NAMES) == "other"


def test_a_broker_that_is_away_is_asked_for_no_place(place: Place, broker: Settings) -> None:
    away = connect(broker.model_copy(update={"url": "redis://127.0.0.1:1/0"}))
    lost = Placing(broker, "here", away)
    assert lost.better("m", NAMES) is None
    lost.note(NAMES)
    away.close()


def test_a_job_that_the_other_worker_does_not_take_is_anyones_again_and_comes_next(redis: Any, place: Place) -> None:
    for job_id in ("taken", "left", "later"):
        ledger.submit(redis, job_id, job_record(generate_request("m", "x", 0, {}), job_id))
    for job_id in ("taken", "left"):
        redis.rpop(keys.ready(QUEUE))
        ledger.claim(redis, job_id, QUEUE, f"{job_id}'s token", f"{job_id}#1", "here")
        assert ledger.pass_on(redis, job_id, QUEUE, f"{job_id}'s token", "other") == "passed"
    redis.rpop(keys.placed(QUEUE, "other"))
    stopped, placing = threading.Event(), place("here")
    placing.start(stopped)
    for job_id in ("taken", "left"):
        placing.recall_later(job_id, QUEUE, "other")
    wait_until(lambda: not redis.exists(keys.placed(QUEUE, "other")), "what is left is recalled")
    stopped.set()
    standing = [json.loads(message)["headers"]["id"] for message in redis.lrange(keys.ready(QUEUE), 0, -1)]
    assert standing == ["later", "left"]


def passed_on(redis: Any, job_id: str) -> None:
    ledger.submit(redis, job_id, job_record(generate_request("m", "x", 0, {}), job_id))
    redis.rpop(keys.ready(QUEUE))
    ledger.claim(redis, job_id, QUEUE, "token", f"{job_id}#1", "here")
    assert ledger.pass_on(redis, job_id, QUEUE, "token", "other") == "passed"


def test_a_worker_that_ends_recalls_at_once_what_it_has_passed_on(redis: Any, place: Place) -> None:
    stopped, placing = threading.Event(), place("here", placement=5.0)
    placing.start(stopped)
    for job_id in ("first", "second"):
        passed_on(redis, job_id)
        placing.recall_later(job_id, QUEUE, "other")
    stopped.set()
    placing.stop()
    assert redis.llen(keys.ready(QUEUE)) == 2
    assert not redis.exists(keys.placed(QUEUE, "other"))


def test_a_job_is_recalled_also_where_the_broker_was_away_for_a_moment(
    redis: Any, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    placing, recall, troubles = place("here"), ledger.recall, iter([True])

    def at_last(*named: Any) -> bool:
        if next(troubles, False):
            raise RedisConnectionError("away")
        return recall(*named)

    monkeypatch.setattr(ledger, "recall", at_last)
    passed_on(redis, "job")
    placing.recall_later("job", QUEUE, "other")
    with pytest.raises(RedisConnectionError):
        placing.recall_next()
    placing.recall_next()
    assert redis.llen(keys.ready(QUEUE)) == 1
