"""The lease: which messages are renewed, and when a worker may take over others'."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker.broker import keys
from stoker.settings import Settings
from tests.conftest import wait_until
from workers.celery import lease as lease_module
from workers.celery.lease import LeaseStep
from workers.context import WorkerContext
from workers.deliveries import Health

LEASE = 8.0
INDEX = f"{keys.PREFIX}unacked_index"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def answer_for(health: Health, clock: Clock, seconds: float) -> None:
    """The broker answers, as often as the thread asks it."""
    end = clock.now + seconds
    health.answered()
    while clock.now < end:
        clock.now += LEASE / lease_module.RENEWALS
        health.answered()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(LEASE, clock)


def test_a_worker_takes_over_after_a_whole_lease_of_answers_and_not_before(health: Health, clock: Clock) -> None:
    assert not health.may_take_over()
    answer_for(health, clock, LEASE - LEASE / lease_module.RENEWALS)
    assert not health.may_take_over()
    answer_for(health, clock, LEASE / lease_module.RENEWALS)
    assert health.may_take_over()


def test_after_an_outage_a_worker_waits_for_a_whole_lease_again(health: Health, clock: Clock) -> None:
    """By then each living worker has renewed its own: until then every lease looks expired."""
    answer_for(health, clock, 2 * LEASE)
    health.failed()
    assert not health.may_take_over()
    answer_for(health, clock, LEASE / 2)
    assert not health.may_take_over()
    answer_for(health, clock, LEASE / 2)
    assert health.may_take_over()


@pytest.mark.parametrize("gap", [LEASE / 2 + 0.1, LEASE, 10 * LEASE])
def test_a_worker_that_was_frozen_takes_over_nothing(health: Health, clock: Clock, gap: float) -> None:
    """Kombu's sweep may ask before the thread has noticed, and after it asked the broker again."""
    answer_for(health, clock, 2 * LEASE)
    clock.now += gap
    assert not health.may_take_over()
    health.answered()
    assert not health.may_take_over(), "the gap was seen only afterwards"


class Consumer:
    """Celery's, whose channels have delivered some messages, of which some are acknowledged."""

    def __init__(self, context: WorkerContext, delivered: set[str], done: set[str]) -> None:
        self._held = delivered - done
        self.app, self.task_consumer = SimpleNamespace(context=context), self
        self.steps: list[object] = []

    def held_tags(self) -> set[str]:
        return self._held


@pytest.fixture
def context(broker: Settings) -> WorkerContext:
    return WorkerContext(broker.model_copy(update={"lease": 3600}))


@pytest.fixture
def make(context: WorkerContext) -> Iterator[Callable[..., LeaseStep]]:
    made: list[LeaseStep] = []

    def start(prefetched: set[str], done: set[str], running: set[str]) -> LeaseStep:
        consumer = Consumer(context, prefetched, done)
        for tag in running:
            delivery: Any = SimpleNamespace(token=f"token-{tag}", tag=tag, queue="stoker.m.embed")
            context.deliveries.add(delivery)
        step = LeaseStep(consumer)
        step.start(consumer)
        made.append(step)
        return step

    yield start
    for step in made:
        step.shutdown(None)
        assert step.thread is not None
        step.thread.join(30)
        step.redis.close()


def test_what_runs_and_what_was_prefetched_is_renewed_and_nothing_else(
    redis: Any, make: Callable[..., LeaseStep]
) -> None:
    redis.zadd(INDEX, dict.fromkeys(["prefetched", "running", "acked", "another's"], 1.0))
    began = time.time()
    make({"prefetched", "acked"}, {"acked"}, {"running"}).renew()
    renewed = {tag.decode() for tag, score in redis.zrange(INDEX, 0, -1, withscores=True) if score >= began}
    assert renewed == {"prefetched", "running"}


def test_a_message_that_was_acknowledged_meanwhile_does_not_come_back(
    redis: Any, make: Callable[..., LeaseStep]
) -> None:
    make({"gone"}, set(), set()).renew()
    assert not redis.exists(INDEX)


class Runtime:
    def __init__(self, errors: Iterator[Exception | None]) -> None:
        self._errors, self.looks = errors, 0

    def fence_lost(self, redis: Any) -> None:
        self.looks += 1
        error = next(self._errors, None)
        if error is not None:
            raise error


def test_a_record_that_cannot_be_read_costs_no_message_its_lease(
    redis: Any, make: Callable[..., LeaseStep], context: WorkerContext
) -> None:
    running: Any = Runtime(iter([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")] * 100))
    context.install(running)
    redis.zadd(INDEX, {"running": 1.0})
    step = make(set(), set(), {"running"})
    assert step.thread is not None
    step.thread.turn()
    redis.zadd(INDEX, {"running": 1.0})
    step.thread.turn()
    assert redis.zscore(INDEX, "running") > 1.0
    assert running.looks >= 2


def test_a_broker_that_is_away_ends_the_health_and_not_the_thread(
    make: Callable[..., LeaseStep], context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: Any = Runtime(iter([]))
    context.install(running)
    seen: list[str] = []
    health: Any = SimpleNamespace(answered=lambda: seen.append("answered"), failed=lambda: seen.append("failed"))
    context.deliveries.health = health
    step = make(set(), set(), set())
    assert step.thread is not None
    wait_until(lambda: seen == ["answered"], "the first renewal")
    seen.clear()
    gone = SimpleNamespace(pipeline=raising(RedisConnectionError("gone")), close=step.redis.close)
    monkeypatch.setattr(step, "redis", gone)
    step.thread.turn()
    assert seen == ["failed"], "the other round needs no broker"
    assert step.thread.alive


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_draining_does_not_end_the_lease(make: Callable[..., LeaseStep]) -> None:
    """`stop` comes with every lost connection, and while the pool drains jobs still run."""
    step = make(set(), set(), set())
    step.stop(None)
    assert step.thread is not None
    # A moment in which it would end.
    step.thread.join(0.3)
    assert step.thread.alive
    step.shutdown(None)
    step.thread.join(30)
    assert not step.thread.alive
