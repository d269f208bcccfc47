"""The watchdog ends a worker whose engine hangs, and no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker.broker import keys, ledger
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.settings import Settings
from workers.services import watchdog
from workers.services.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def runtime(settings: Settings | None = None, jobs: tuple[str, ...] = ()) -> Any:
    engine = SimpleNamespace(step_began=None)
    return SimpleNamespace(engine=engine, settings=settings, jobs=list(jobs), stopped=threading.Event())


def looks(dog: Watchdog, clock: SimpleNamespace, seconds: int) -> bool:
    found = False
    for _ in range(seconds):
        clock.now += 1.0
        found = found or dog.look()
    return found


def test_a_step_that_does_not_end_is_found(clock: SimpleNamespace) -> None:
    worker = runtime()
    dog = Watchdog(worker, 10)
    worker.engine.step_began = clock.now
    assert not looks(dog, clock, 10)
    assert looks(dog, clock, 3)


def test_many_steps_one_after_the_other_are_no_hang(clock: SimpleNamespace) -> None:
    worker = runtime()
    dog = Watchdog(worker, 10)
    for _ in range(5):
        worker.engine.step_began = clock.now
        assert not looks(dog, clock, 8)
    worker.engine.step_began = None
    assert not looks(dog, clock, 60)


def test_a_process_that_was_frozen_is_no_hang(clock: SimpleNamespace) -> None:
    worker = runtime()
    dog = Watchdog(worker, 10)
    worker.engine.step_began = clock.now
    looks(dog, clock, 5)
    clock.now += 3600
    assert not dog.look(), "nobody was there to see the step run"


def test_a_hang_is_noted_in_the_record_of_each_job_and_ends_the_process(
    broker: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(watchdog, "LOOK_EVERY", 0.02)
    worker, redis = runtime(broker, ("one", "spoiled", "two")), connect(broker)
    for job_id in ("one", "two"):
        ledger.submit(redis, job_id, job_record(generate_request("m", "x", 0, {}), job_id))
    redis.set(keys.job("spoiled"), "garbage", ex=60)
    worker.engine.step_began = 1.0
    ended = threading.Event()
    Watchdog(worker, 0.05, end=ended.set).start()
    assert ended.wait(30)
    for job_id in ("one", "two"):
        assert b"longer than 0.05 s" in redis.hget(keys.job(job_id), Field.TROUBLE)
    redis.close()
    assert [record.getMessage()[:49] for record in caplog.records if "does not say it" in record.getMessage()] == [
        "the record of job spoiled does not say it: WRONGTY"[:49]
    ]
    assert "watchdog.py" in capfd.readouterr().err, "the stack of every thread"


def test_a_worker_whose_hang_cannot_be_reported_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, broker: Settings
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    ended = threading.Event()
    dog = Watchdog(runtime(broker), 1e-9, ended.set)
    monkeypatch.setattr(dog, "look", lambda: True)
    monkeypatch.setattr(watchdog, "connect", broken)
    dog.start()
    assert ended.wait(30)


def test_a_worker_that_hangs_ends_without_a_word_to_a_broker_that_is_away(
    broker: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object, **__: object) -> None:
        raise RedisConnectionError("nobody answers")

    monkeypatch.setattr(watchdog, "connect", away)
    ended: list[int] = []
    dog = Watchdog(runtime(broker, ("one",)), 10, lambda: ended.append(1))
    monkeypatch.setattr(dog, "look", lambda: True)
    begun(dog, monkeypatch).work()
    assert ended == [1]
    assert "the records of the jobs do not say it: nobody answers" in caplog.text


def test_no_limit_is_no_watchdog() -> None:
    before = threading.active_count()
    Watchdog(runtime(), 0).start()
    assert threading.active_count() == before


class Thread:
    """What a watchdog's own thread would do, the event that ends it, and what ends the process if it breaks."""

    def __init__(self, name: str, work: Callable[[], object], **named: Any) -> None:
        self.work, self.stopped, self.end = work, named["stopped"], named["end"]

    def start(self) -> None: ...


def begun(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> Thread:
    made: list[Thread] = []

    def thread(*given: Any, **named: Any) -> Thread:
        made.append(Thread(*given, **named))
        return made[-1]

    monkeypatch.setattr(watchdog, "Background", thread)
    dog.start()
    return made[0]


def test_a_report_of_a_hang_waits_no_longer_than_a_second_for_a_broker(
    broker: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that is away must not keep a worker alive whose engine hangs."""
    asked: list[float | None] = []

    def connected(settings: Settings, timeout: float | None = None) -> Any:
        asked.append(timeout)
        return connect(settings, timeout=timeout)

    monkeypatch.setattr(watchdog, "connect", connected)
    ended: list[int] = []
    dog = Watchdog(runtime(broker, ("job",)), 10, lambda: ended.append(1))
    monkeypatch.setattr(dog, "look", lambda: True)
    thread = begun(dog, monkeypatch)
    thread.work()
    assert asked == [watchdog.REPORT_WITHIN]
    assert watchdog.REPORT_WITHIN <= 2
    assert ended == [1]
    assert thread.stopped.is_set(), "the thread has nothing more to do"


def test_a_watchdog_ends_with_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = runtime()
    dog = Watchdog(worker, 10, lambda: pytest.fail("nothing hangs"))
    thread = begun(dog, monkeypatch)
    worker.stopped.set()
    monkeypatch.setattr(dog, "look", lambda: pytest.fail("a worker that stops is not looked at"))
    thread.work()
    assert thread.stopped.is_set()


def test_what_ends_the_watchdog_itself_ends_the_worker_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    begun(Watchdog(runtime(), 10, lambda: ended.append(1)), monkeypatch).end()
    assert ended == [1]


def test_an_engine_that_rests_is_no_hang_however_long(clock: SimpleNamespace) -> None:
    dog = Watchdog(runtime(), 10)
    assert not looks(dog, clock, 100)
