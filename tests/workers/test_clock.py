"""The broker's clock decides which leases have run out and which workers are there; a worker's own decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import kombu.transport.redis as kombu_redis
import pytest

from stoker import Client
from stoker.broker import keys
from stoker.broker.envelope import envelope
from stoker.celery_config import shared_config
from stoker.contract import ModelCard
from stoker.settings import Settings
from tests.workers.test_presence import Others, heart
from workers import clock, run_sweep
from workers.celery import transport
from workers.celery.transport import WorkerConnection
from workers.deliveries import Deliveries

QUEUE = keys.queue("m", "generate")
LEASE = 10
#: More than a lease, in both directions.
OFFSETS = (-3600.0, -15.0, 15.0, 3600.0)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """This machine's clock is off from now on by so many seconds, for Stoker and for kombu."""
    real = time.time

    def be_off(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + seconds)
        monkeypatch.setattr(kombu_redis, "time", lambda: real() + seconds)

    return be_off


@pytest.fixture
def health() -> Any:
    """Of a worker that may take over what others held for longer than a lease."""
    return SimpleNamespace(may_take_over=lambda: True)


@pytest.fixture
def qos(broker: Settings, health: Any) -> Iterator[Any]:
    """Of one channel of that worker."""
    transport.install()
    config = shared_config(broker)
    options = config["broker_transport_options"] | {"polling_interval": 0.05, "visibility_timeout": LEASE}
    options |= {"unacked_restore_throttle": 1}
    with WorkerConnection(config["broker_url"], transport_options=options, deliveries=Deliveries(health)) as made:
        yield made.default_channel.qos
        poller = made.transport.cycle.poller
    # kombu leaves it to the interpreter.
    poller.close()


def deliver(qos: Any, exchange: str = "") -> None:
    """A message is taken. Stoker's name no exchange; others' may."""
    made = json.loads(envelope("job", "generate", "m", QUEUE))
    made["properties"]["delivery_tag"] = "job#1"
    made["properties"]["delivery_info"]["exchange"] = exchange
    qos.append(qos.channel.message_to_python(made), "job#1")


def sweep(qos: Any) -> None:
    """What kombu does every second."""
    cycle = qos.channel.connection.cycle
    cycle.add(qos.channel)
    qos.channel._active_queues.append(QUEUE)
    cycle.maybe_restore_messages()


def test_what_goes_for_its_age_goes_by_the_clock_that_is_behind(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    brokers = clock.now(redis)
    for offset in OFFSETS:
        monkeypatch.setattr(time, "time", lambda offset=offset: brokers + offset)
        assert abs(clock.behind(redis) - (brokers + min(0.0, offset))) < 10


def test_a_clock_that_has_leapt_ahead_makes_no_checkpoint_of_another_brokers_run_old(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    brokers, year = clock.now(redis), 365 * 24 * 3600.0
    runtime: Any = SimpleNamespace(settings=Settings(), redis=redis)
    asked: list[float] = []

    def sweep(settings: Settings, redis: Any, now: float) -> list[str]:
        asked.append(now)
        return []

    monkeypatch.setattr(run_sweep, "sweep", sweep)
    monkeypatch.setattr(time, "time", lambda: brokers + 10 * year)
    run_sweep.round_of(runtime)
    assert abs(asked[0] - brokers) < 60


@pytest.mark.parametrize("off", OFFSETS)
def test_a_worker_whose_clock_is_off_takes_no_message_that_another_holds(
    redis: Any, qos: Any, set_clock: Callable[[float], None], off: float
) -> None:
    deliver(qos)
    set_clock(off)
    sweep(qos)
    assert redis.hkeys(keys.UNACKED) == [b"job#1"]
    assert not redis.exists(keys.ready(QUEUE))


@pytest.mark.parametrize("off", OFFSETS)
def test_a_worker_whose_clock_is_off_holds_its_messages_by_the_brokers(
    redis: Any, qos: Any, set_clock: Callable[[float], None], off: float
) -> None:
    set_clock(off)
    before = clock.now(redis)
    deliver(qos)
    assert before <= redis.zscore(keys.LEASES, "job#1") <= clock.now(redis)
    redis.zadd(keys.LEASES, {"job#1": 1.0, "other": 1.0})
    clock.renew(redis, ["job#1", "gone"])
    assert before <= redis.zscore(keys.LEASES, "job#1") <= clock.now(redis)
    assert redis.zscore(keys.LEASES, "other") == 1.0
    assert redis.zscore(keys.LEASES, "gone") is None


@pytest.mark.parametrize("off", OFFSETS)
def test_a_lease_that_ran_out_by_the_brokers_clock_is_taken_over(
    redis: Any, qos: Any, set_clock: Callable[[float], None], off: float
) -> None:
    deliver(qos)
    redis.zadd(keys.LEASES, {"job#1": clock.now(redis) - LEASE - 1})
    set_clock(off)
    sweep(qos)
    assert redis.llen(keys.ready(QUEUE)) == 1
    assert not redis.exists(keys.UNACKED, keys.LEASES)


def test_a_worker_that_may_not_take_over_yet_leaves_what_ran_out(redis: Any, qos: Any, health: Any) -> None:
    """After an outage every lease looks expired."""
    deliver(qos)
    redis.zadd(keys.LEASES, {"job#1": 1.0})
    health.may_take_over = lambda: False
    sweep(qos)
    assert redis.hkeys(keys.UNACKED) == [b"job#1"]
    health.may_take_over = lambda: True
    sweep(qos)
    assert not redis.exists(keys.UNACKED)


@pytest.mark.parametrize("off", [*OFFSETS, 60 * 24 * 3600.0])
def test_clients_and_workers_whose_clocks_differ_see_each_other(
    redis: Any, broker: Settings, set_clock: Callable[[float], None], off: float
) -> None:
    heart(redis, Others()).beat()
    set_clock(off)
    redis.hset(keys.MODELS, "old", ModelCard(model="old", architecture="a", kinds=(), context=1, parameters=1)
               .model_copy(update={"seen": clock.now(redis) - keys.MODEL_TTL - 60}).model_dump_json())  # fmt: skip
    with Client(settings=broker) as client:
        assert [worker.worker for worker in client.workers()] == ["w@here"]
        assert list(client.models()) == ["m"]
    heart(redis, Others()).beat()
    assert abs(redis.zscore(keys.WORKERS, "w@here") - clock.now(redis)) < 60


def test_a_lease_that_was_lost_begins_now_and_one_that_is_there_runs_out_when_it_would(redis: Any) -> None:
    """Of a dead worker's message it must run out, however often lost ones are looked for."""
    for tag in ("dead", "lost"):
        redis.hset(keys.UNACKED, tag, "a message")
    redis.zadd(keys.LEASES, {"dead": 1000.5})
    before = clock.now(redis)
    clock.hold_lost(redis)
    found = dict(redis.zrange(keys.LEASES, 0, -1, withscores=True))
    assert found.keys() == {b"dead", b"lost"}
    assert found[b"dead"] == 1000.5
    assert before <= found[b"lost"] <= clock.now(redis)
