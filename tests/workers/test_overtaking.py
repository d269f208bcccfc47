"""A full lane takes a job that is better than those it holds, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.broker import keys, ledger
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.settings import Settings
from workers.capacity import Lanes
from workers.services.overtaking import KIND, LEFT_AFTER, Overtaking

SLOTS, EXTRA = 3, 2
QUEUES = [keys.queue("m", KIND), keys.queue("other", KIND)]


class Worker:
    """A lane of three slots and two more, and the jobs that run in it."""

    def __init__(self, redis: Any) -> None:
        self.redis, self.lanes, self.woken = redis, Lanes(), 0
        self.here: list[int] = []
        self.lanes.configure({KIND: SLOTS}, {KIND: QUEUES})
        self.lanes.wake = self._wake
        #: The best priority of a neighbour's streams.
        self.neighbour = 9
        runtime: Any = SimpleNamespace(
            redis=redis,
            priorities=lambda kind: self.here if kind == KIND else [],
            makes_way=lambda priority: self.neighbour < min(priority, *self.here, 9),
        )
        self.runtime, self.overtaking = runtime, Overtaking(runtime, self.lanes, EXTRA)

    def _wake(self) -> None:
        self.woken += 1

    def hold(self, *priorities: int) -> None:
        for priority in priorities:
            self.lanes.enter(KIND)
            self.here.append(priority)

    def waits(self, job_id: str, priority: int, model: str = "m") -> None:
        ledger.submit(self.redis, job_id, job_record(generate_request(model, "x", 0, {"priority": priority}), job_id))

    def takes_one_more(self) -> bool:
        self.overtaking.round()
        return self.lanes.has_room(KIND)


@pytest.fixture
def worker(broker: Settings) -> Iterator[Worker]:
    client = connect(broker)
    yield Worker(client)
    client.close()


def test_a_full_lane_of_worse_jobs_takes_a_better_one_once(worker: Worker) -> None:
    worker.hold(9, 9, 9)
    worker.waits("bulk", 9)
    assert not worker.takes_one_more(), "it is not better"
    worker.waits("stream", 5)
    assert worker.takes_one_more()
    assert worker.woken == 1, "the consumer's loop looks again"
    worker.hold(5)
    assert not worker.lanes.has_room(KIND), "one, not all that come"
    worker.lanes.leave(KIND)
    assert not worker.lanes.has_room(KIND), "what was lent is used up"


def test_what_waits_at_another_model_of_the_lane_counts_too(worker: Worker) -> None:
    worker.hold(9, 9, 9)
    worker.waits("bulk", 9)
    worker.waits("stream", 5, "other")
    assert worker.takes_one_more()


@pytest.mark.parametrize(("held", "waiting", "takes"), [
    ((5, 5, 5), 5, False),
    ((5, 5, 5), 4, True),
    ((5, 5, 9), 5, True),
    ((5, 5, 5, 9), 5, False),
    ((9, 9, 9, 9), 5, True),
    ((9, 9, 9, 9, 9), 0, False),
    ((0, 0, 0), 0, False),
    ((9, 9), 5, True),
])  # fmt: skip
def test_as_many_better_jobs_have_a_slot_as_there_are_and_a_bound_holds(
    worker: Worker, held: tuple[int, ...], waiting: int, takes: bool
) -> None:
    worker.hold(*held)
    worker.waits("job", waiting)
    assert worker.takes_one_more() is takes


def test_a_job_that_is_held_and_not_prepared_yet_counts_as_good(worker: Worker) -> None:
    worker.hold(9, 9)
    worker.lanes.enter(KIND)
    worker.waits("stream", 5)
    assert worker.takes_one_more(), "two of three are worse"
    worker.lanes.enter(KIND)
    worker.lanes.enter(KIND)
    assert not worker.takes_one_more()


def test_what_cannot_be_read_at_the_head_of_a_list_is_left_to_who_takes_it(worker: Worker) -> None:
    worker.hold(9, 9, 9)
    worker.redis.rpush(keys.ready(QUEUES[0]), b"\xff no message")
    worker.redis.expire(keys.ready(QUEUES[0]), 60)
    worker.redis.set(keys.ready(QUEUES[1]), "of another program", ex=60)
    assert not worker.takes_one_more()
    worker.redis.delete(keys.ready(QUEUES[1]))
    worker.waits("stream", 5, "other")
    worker.redis.hset(keys.job("stream"), Field.PRIORITY, "none")
    assert not worker.takes_one_more()
    worker.redis.hset(keys.job("stream"), Field.PRIORITY, "5")
    assert worker.takes_one_more()


@pytest.mark.parametrize("held", [(9, 9), (0, 0, 0), (9, 9, 9, 9, 9)])
def test_a_lane_that_could_take_nothing_in_addition_asks_the_broker_nothing(
    worker: Worker, held: tuple[int, ...]
) -> None:
    worker.hold(*held)
    worker.runtime.redis = None
    worker.overtaking.round()


def test_next_to_streams_of_another_worker_a_lane_takes_a_first_job_of_bulk_and_then_what_need_not_rest(
    worker: Worker,
) -> None:
    """That worker runs bulk in the passes of its streams, at less cost."""
    worker.waits("bulk", 9)
    worker.neighbour = 5
    assert worker.takes_one_more(), "bulk goes on where the other worker is full"
    worker.hold(9)
    assert not worker.takes_one_more()
    assert worker.lanes.load()[KIND] == (1, 1), "who sends bulk counts on no more here"
    assert "another worker on this machine runs streams" in worker.lanes.held_back[KIND]
    worker.waits("stream", 5)
    assert worker.takes_one_more(), "a stream as good has the slot that is free"


def test_bulk_that_nobody_takes_is_taken_all_the_same_one_by_one(worker: Worker) -> None:
    """The other worker is full, or has another model."""
    worker.hold(9)
    worker.neighbour = 5
    worker.waits("bulk", 9)
    assert not any(worker.takes_one_more() for _ in range(LEFT_AFTER))
    assert worker.takes_one_more()
    worker.hold(9)
    worker.redis.delete(keys.ready(QUEUES[0]))
    worker.waits("next", 9)
    assert not any(worker.takes_one_more() for _ in range(LEFT_AFTER)), "another job, another wait"
    assert worker.takes_one_more()


def test_when_the_other_workers_streams_have_ended_the_lane_is_open_at_once(worker: Worker) -> None:
    worker.hold(9, 9)
    worker.neighbour = 5
    worker.overtaking.round()
    assert not worker.lanes.has_room(KIND)
    woken = worker.woken
    worker.neighbour = 9
    worker.overtaking.round()
    assert worker.lanes.has_room(KIND)
    assert worker.woken == woken + 1
    assert worker.lanes.held_back == {}
    worker.overtaking.round()
    assert worker.woken == woken + 1, "once"


def test_a_worker_with_a_stream_as_good_takes_bulk_as_ever(worker: Worker) -> None:
    worker.hold(5, 9)
    worker.neighbour = 5
    worker.waits("bulk", 9)
    assert worker.takes_one_more()


def test_a_lane_that_is_full_next_to_streams_of_another_worker_takes_one_that_is_better(worker: Worker) -> None:
    worker.hold(9, 9, 9)
    worker.neighbour = 5
    worker.waits("bulk", 8)
    assert worker.takes_one_more(), "it is better than those here, and makes way as they do"
    worker.hold(8, 9)
    worker.waits("stream", 5)
    assert not worker.takes_one_more(), "the bound holds"
