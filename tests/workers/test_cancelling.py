"""Hearing of cancels: a nudge is fast, the durable mark is sure, and no message ends the listening."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.ticket import Ticket
from stoker.broker import keys
from stoker.errors import JobCancelled
from stoker.settings import Settings
from tests.conftest import wait_until
from workers.services import cancelling
from workers.services.cancelling import CancelWatch
from workers.services.runtime import Runtime


class Engine:
    def wake(self) -> None: ...


@pytest.fixture
def runtime(broker: Settings) -> Iterator[Runtime]:
    """A worker's, with the part left out that runs models."""
    made = Runtime(broker, "w@here", lambda publish: Engine())  # type: ignore[arg-type, return-value]
    yield made
    made.stopped.set()
    made.redis.close()


def ticket(job_id: str) -> Ticket[Any]:
    return Ticket(job_id, "generate")


def test_a_worker_knows_the_priorities_of_the_jobs_of_a_kind_that_run(runtime: Runtime) -> None:
    bulk: Ticket[Any] = Ticket("one", "generate", priority=9)
    training: Ticket[Any] = Ticket("two", "train", priority=2)
    with runtime.running("1", bulk), runtime.running("2", training), runtime.running("3", ticket("three")):
        assert runtime.priorities("generate") == [9, 5]
    assert runtime.priorities("generate") == []


def test_a_nudge_stops_the_job_that_it_names_and_no_other(runtime: Runtime) -> None:
    watch, one, other = CancelWatch(runtime), ticket("one"), ticket("other")
    with runtime.running("1", one), runtime.running("2", other):
        watch.hear({"data": b"one"})
    assert isinstance(one.stop, JobCancelled)
    assert other.stop is None


@pytest.mark.parametrize("data", [b"\xff", b"", b"no such job", b"\x00" * 10_000])
def test_a_nudge_that_names_no_job_stops_none(runtime: Runtime, data: bytes) -> None:
    ticket: Ticket[Any] = Ticket("one", "generate")
    with runtime.running("1", ticket):
        CancelWatch(runtime).hear({"data": data})
    assert ticket.stop is None


def test_the_mark_of_a_cancel_is_found_without_a_nudge(runtime: Runtime, redis: Any) -> None:
    one, other = ticket("one"), ticket("other")
    redis.set(keys.cancel("one"), "1", ex=60)
    with runtime.running("1", one), runtime.running("2", other):
        CancelWatch(runtime).hear(None)
    assert isinstance(one.stop, JobCancelled)
    assert other.stop is None


def test_the_mark_of_a_cancel_is_found_while_nudges_of_other_jobs_come_without_a_pause(
    runtime: Runtime, redis: Any
) -> None:
    now, one = [100.0], ticket("one")
    watch = CancelWatch(runtime, lambda: now[0])
    with runtime.running("1", one):
        # Its own nudge came before the job ran here.
        redis.set(keys.cancel("one"), "1", ex=60)
        watch.hear({"data": b"another"})
        assert one.stop is None
        now[0] += cancelling.SWEEP_EVERY
        watch.hear({"data": b"another"})
        assert isinstance(one.stop, JobCancelled)


def test_the_marks_are_looked_at_once_a_second_and_not_with_each_nudge(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looks = [100.0], list[float]()
    monkeypatch.setattr(runtime, "cancel_if_asked", lambda: looks.append(now[0]))
    watch = CancelWatch(runtime, lambda: now[0])
    for _ in range(5):
        now[0] += cancelling.SWEEP_EVERY / 2
        watch.hear({"data": b"another"})
    assert looks == [100.0 + cancelling.SWEEP_EVERY, 100.0 + 2 * cancelling.SWEEP_EVERY]


def test_without_running_jobs_the_broker_is_not_asked(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "redis", SimpleNamespace(close=lambda: None))
    CancelWatch(runtime).hear(None)


def test_a_job_of_the_same_id_in_two_deliveries_stops_in_both(runtime: Runtime) -> None:
    first, second = ticket("one"), ticket("one")
    with runtime.running("1", first), runtime.running("2", second):
        CancelWatch(runtime).hear({"data": b"one"})
    assert first.stop is not None
    assert second.stop is not None


def test_listening_goes_on_after_bytes_that_are_no_text(
    runtime: Runtime, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "SWEEP_EVERY", 0.05)
    before = threading.active_count()
    CancelWatch(runtime).start()
    wait_until(lambda: redis.pubsub_numsub(keys.CANCELS)[0][1] == 1, "the worker listens")
    ticket: Ticket[Any] = Ticket("one", "generate")
    with runtime.running("1", ticket):
        redis.publish(keys.CANCELS, b"\xff\xfe")
        redis.publish(keys.CANCELS, "one")
        wait_until(lambda: ticket.stop is not None, "the cancel was heard")
    runtime.stopped.set()
    wait_until(lambda: threading.active_count() == before, "the thread ends with the worker")


def test_a_worker_that_stops_hears_no_more_and_lets_go_of_its_channel(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the channel says of itself is no nudge; and a moment without one is bounded."""
    asked: list[dict[str, Any]] = []

    class Channel:
        closed = 0

        def __enter__(self) -> Channel:
            return self

        def __exit__(self, *_: object) -> None:
            self.closed += 1

        def subscribe(self, *channels: str) -> None:
            assert channels == (keys.CANCELS,)

        def get_message(self, **options: Any) -> None:
            asked.append(options)
            runtime.stopped.set()

    channel, given = Channel(), list[dict[str, Any]]()

    def pubsub(**options: Any) -> Channel:
        given.append(options)
        return channel

    monkeypatch.setattr(runtime, "redis", SimpleNamespace(pubsub=pubsub, close=lambda: None))
    CancelWatch(runtime).start()
    wait_until(lambda: channel.closed, "it lets go")
    assert given == [{"ignore_subscribe_messages": True}]
    assert asked == [{"timeout": cancelling.SWEEP_EVERY}]
    assert channel.closed == 1


def test_a_broker_that_is_away_is_not_asked_in_a_hurry(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(cancelling, "Background", lambda name, work, *, stopped, every=0.0: pauses.append(every))
    CancelWatch(runtime)
    assert pauses == [cancelling.SWEEP_EVERY]
