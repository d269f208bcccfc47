"""A worker's presence: written even if everything else fails, and taken away at the end."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ResponseError

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.client.model_choice import parse_cards, parse_presences
from stoker.contract import CONTRACT, ModelCard
from stoker.contract.presence import ModelState
from stoker.settings import Settings
from workers import clock
from workers.services.keeper import Residency
from workers.services.presence import Heart

CARD = ModelCard(model="m", architecture="a", kinds=("embed",), context=1, parameters=1)


class Others:
    """The lanes and the janitor; the janitor may fail."""

    def __init__(self) -> None:
        self.grown = self.rounds = 0
        self.error: Exception | None = None

    def load(self) -> dict[str, tuple[int, int]]:
        return {"embed": (0, 1)}

    @property
    def held_back(self) -> dict[str, str]:
        return {"embed": "it does not fit"}

    def grow(self) -> None:
        self.grown += 1

    def round(self) -> None:
        self.rounds += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def others() -> Others:
    return Others()


def heart(redis: Any, others: Any, janitor: Any = None) -> Heart:
    engine = SimpleNamespace(device="cpu", cards=[CARD], adapters={}, memory_bytes=1, ranks=2)
    runtime: Any = SimpleNamespace(
        redis=redis, name="w@here", engine=engine, started=1.0, stopped=threading.Event(), stopping=False
    )
    return Heart(runtime, others, janitor or others)


def test_a_beat_says_what_is_warm_and_expires(redis: Any, others: Others) -> None:
    heart(redis, others).thread.turn()
    (presence,) = parse_presences([redis.get(keys.worker("w@here"))])
    assert presence.models == (CARD,)
    assert 0 < redis.ttl(keys.worker("w@here")) <= keys.PRESENCE_TTL
    assert list(parse_cards(redis.hgetall(keys.MODELS))) == ["m"]
    assert redis.zscore(keys.WORKERS, "w@here")


def test_a_presence_is_dated_by_the_broker_from_when_the_worker_started(
    redis: Any, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`started` of the runtime is this machine's own count of seconds, which says nothing to others."""
    monkeypatch.setattr("workers.services.presence.time.monotonic", lambda: 601.0)
    heart(redis, others).beat()
    (presence,) = parse_presences([redis.get(keys.worker("w@here"))])
    assert presence.time == pytest.approx(clock.now(redis), abs=60)
    assert presence.time - presence.started == pytest.approx(600, abs=0.01)


def test_workers_that_went_silent_long_ago_are_forgotten(redis: Any, others: Others) -> None:
    redis.zadd(keys.WORKERS, {"long ago": 1.0, "of today": clock.now(redis) - 60})
    heart(redis, others).beat()
    assert redis.zrange(keys.WORKERS, 0, -1) == [b"of today", b"w@here"]


def test_workers_of_two_generations_each_have_a_card_of_the_same_model(
    redis: Any, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client takes the one that it understands: `parse_cards`."""
    heart(redis, others).beat()
    monkeypatch.setattr(f"{__name__}.CARD", CARD.model_copy(update={"contract": CONTRACT + 1}))
    heart(redis, others).beat()
    assert sorted(redis.hkeys(keys.MODELS)) == [f"m/{CONTRACT}".encode(), f"m/{CONTRACT + 1}".encode()]
    assert parse_cards(redis.hgetall(keys.MODELS), clock.now(redis))["m"].contract == CONTRACT


@pytest.mark.parametrize("error", [ResponseError("WRONGTYPE"), ValueError("no JSON")])
def test_a_janitor_that_fails_costs_no_beat(redis: Any, others: Others, error: Exception) -> None:
    beats, others.error = heart(redis, others), error
    for _ in range(3):
        redis.delete(keys.worker("w@here"))
        beats.thread.turn()
        assert redis.exists(keys.worker("w@here"))
    assert (others.grown, others.rounds) == (3, 3)


def test_a_beat_that_fails_costs_neither_lanes_nor_janitor(redis: Any, others: Others) -> None:
    redis.set(keys.WORKERS, "not a sorted set", ex=60)
    heart(redis, others).thread.turn()
    assert (others.grown, others.rounds) == (1, 1)
    assert redis.exists(keys.worker("w@here")), "what could be written was written"


def test_a_worker_that_stops_takes_its_presence_away(redis: Any, others: Others) -> None:
    beats = heart(redis, others)
    beats.thread.turn()
    beats.say_goodbye()
    assert not redis.exists(keys.worker("w@here"))
    assert redis.zscore(keys.WORKERS, "w@here") is None


def test_a_beat_that_was_under_way_does_not_come_behind_the_goodbye(redis: Any, others: Others) -> None:
    beats, under_way, go_on = heart(redis, others), threading.Event(), threading.Event()

    def slow() -> Residency:
        under_way.set()
        go_on.wait(10)
        return Residency()

    beats.residency = slow
    beat, goodbye = threading.Thread(target=beats.beat), threading.Thread(target=beats.say_goodbye)
    beat.start()
    under_way.wait(10)
    goodbye.start()
    go_on.set()
    for thread in (beat, goodbye):
        thread.join(10)
    beats.beat()
    assert not redis.exists(keys.worker("w@here"))


def test_a_goodbye_that_no_broker_hears_ends_nothing_else(others: Others, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        heart(connect(Settings(url="redis://127.0.0.1:1/0")), others).say_goodbye()
    assert f"The presence expires in {keys.PRESENCE_TTL} s" in caplog.text


def test_a_beat_says_what_may_be_loaded_and_how_each_model_is(redis: Any, others: Others) -> None:
    beats = heart(redis, others)
    lazy, state = CARD.model_copy(update={"model": "lazy"}), ModelState(model="lazy", state="offered")
    beats.residency = lambda: Residency((lazy,), (state,), 77)
    beats.beat()
    (presence,) = parse_presences([redis.get(keys.worker("w@here"))])
    assert (presence.offers, presence.states, presence.model_limit) == ((lazy,), (state,), 77)
    assert presence.lanes == {"embed": (0, 1)}
    assert sorted(parse_cards(redis.hgetall(keys.MODELS))) == ["lazy", "m"], "a client may send to it"


def test_a_worker_says_that_it_lives_before_it_looks_for_what_others_lost(redis: Any, others: Others) -> None:
    """The janitor may take seconds, and takes the jobs of a worker that is not there."""
    order: list[str] = []
    lanes = SimpleNamespace(load=others.load, held_back={}, grow=lambda: order.append("lanes"))
    janitor = SimpleNamespace(
        round=lambda: order.append("janitor" if redis.exists(keys.worker("w@here")) else "too early")
    )
    heart(redis, lanes, janitor).thread.turn()
    assert order == ["lanes", "janitor"]
