"""Stopping: what is given back, when, and what a worker does whose broker is away."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.conftest import wait_until
from workers.capacity import Lanes
from workers.deliveries import Deliveries, Health
from workers.services import drain as drain_module
from workers.services.drain import MISSES, Drain


class Worker:
    """What is reported to it, and a broker that answers as often as `answers` says."""

    def __init__(self, grace: float = 0.0, answers: Sequence[bool] = ()) -> None:
        self.settings = SimpleNamespace(grace=grace)
        self.handed_back: list[set[str]] = []
        self.deliveries = Deliveries(Health(1))
        self.ended = self.hurried = 0
        self._answers = iter(answers)

    def hand_back(self, kinds: set[str]) -> None:
        self.handed_back.append(kinds)

    def hurry(self) -> None:
        self.hurried += 1

    def ping(self) -> bool:
        if not next(self._answers):
            raise RedisConnectionError("gone")
        return True

    def end(self) -> None:
        self.ended += 1

    def drain(self) -> Drain:
        running: Any = self
        return Drain(running, redis=self, end=self.end)


def test_training_goes_back_at_once_and_the_rest_has_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(grace=3600)
    started: list[Any] = []
    monkeypatch.setattr(drain_module, "Drain", lambda runtime: SimpleNamespace(start=lambda: started.append(runtime)))
    running: Any = worker
    lanes = Lanes()
    lanes.configure({"generate": 4}, {"generate": []})
    lanes.enter("generate")
    drain_module.begin(running, worker.deliveries, lanes)
    assert worker.handed_back == [{"train"}]
    assert started == [worker]
    assert worker.hurried == 1, "no job that has the grace rests for others"
    assert running.stopping
    assert lanes.load() == {"generate": (1, 1)}, "no prompt is passed on to it"
    assert worker.deliveries.go_back, "what was prefetched goes back as its channel closes"


def test_at_the_end_of_the_grace_jobs_of_every_kind_go_back() -> None:
    worker = Worker()
    worker.drain().end_of_grace()
    assert worker.handed_back == [{"train", "generate", "embed", "adapters"}]


def looks(worker: Worker, count: int) -> None:
    drain = worker.drain()
    for _ in range(count):
        drain.look()


def test_a_broker_that_misses_two_looks_in_a_row_ends_the_worker() -> None:
    assert MISSES == 2
    worker = Worker(answers=[True, False, False])
    looks(worker, 2)
    assert not worker.ended
    worker = Worker(answers=[True, False, False])
    looks(worker, 3)
    assert worker.ended == 1


def test_misses_do_not_add_up_when_the_broker_answers_between_them() -> None:
    worker = Worker(answers=[False, True] * 10)
    looks(worker, 20)
    assert not worker.ended


def test_the_thread_hands_back_after_the_grace_and_looks_until_the_broker_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drain_module, "LOOK_EVERY", 0.0)
    worker = Worker(grace=0.01, answers=[True, False, True, False, False])
    worker.drain().start()
    wait_until(lambda: worker.ended, "the worker ends")
    assert worker.ended == 1
    assert worker.handed_back == [{"train", "generate", "embed", "adapters"}], "once, not at every look"


class Thread:
    """What a drain's own thread would do, and the event that ends it."""

    def __init__(self, name: str, work: Callable[[], object], *, stopped: threading.Event, every: float) -> None:
        self.work, self.stopped = work, stopped

    def start(self) -> None: ...


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[Thread]:
    made: list[Thread] = []

    def begun(*given: Any, **named: Any) -> Thread:
        made.append(Thread(*given, **named))
        return made[-1]

    monkeypatch.setattr(drain_module, "Background", begun)
    return made


def test_a_worker_without_a_broker_is_ended_once_and_its_thread_looks_no_more(threads: list[Thread]) -> None:
    worker = Worker(answers=[False] * MISSES)
    worker.drain().start()
    for _ in range(MISSES):
        threads[0].work()
    assert worker.ended == 1
    assert threads[0].stopped.is_set()


def test_a_look_at_the_broker_takes_no_longer_than_the_pause_between_two(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float | None] = []
    monkeypatch.setattr(drain_module, "connect", lambda settings, timeout=None: asked.append(timeout))
    worker: Any = SimpleNamespace(settings=None)
    Drain(worker, end=lambda: None)
    assert asked == [drain_module.LOOK_EVERY]


def test_the_grace_is_waited_for_before_anything_goes_back(
    threads: list[Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(grace=7.0, answers=[True, True])
    worker.drain().start()
    waited: list[float] = []
    monkeypatch.setattr(threads[0].stopped, "wait", waited.append)
    for _ in range(2):
        threads[0].work()
    assert waited == [7.0]
    assert worker.handed_back == [{"train", "generate", "embed", "adapters"}]


def test_a_worker_that_a_broker_left_ends_with_the_code_by_which_it_is_started_again() -> None:
    """What starts a worker anew asks for that: sysexits.h says that the failure is for now."""
    assert drain_module.EX_TEMPFAIL == os.EX_TEMPFAIL
