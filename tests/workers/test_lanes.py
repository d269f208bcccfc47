"""Lanes: a worker holds no more jobs of a kind than it can run, and its places come back."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.settings import Settings
from workers import capacity
from workers.capacity import Lanes
from workers.celery.lanes import LaneRequest, LaneStep
from workers.context import WorkerContext

LIMITS = {"generate": 3, "train": 1}
QUEUES = {"generate": ["stoker.a.generate", "stoker.b.generate"], "train": ["stoker.a.train"]}


class FakeConsumer:
    """A Celery consumer's loop: how often it was made to look again."""

    def __init__(self, context: WorkerContext | None = None) -> None:
        self.looks, self.app = 0, SimpleNamespace(context=context)

    def call_soon(self, function: Callable[..., None]) -> None:
        function()
        self.looks += 1


@pytest.fixture
def context() -> WorkerContext:
    return WorkerContext(Settings())


def make() -> tuple[Lanes, FakeConsumer]:
    lanes, consumer = Lanes(), FakeConsumer()
    lanes.configure(LIMITS, QUEUES)
    lanes.wake = lambda: consumer.call_soon(lambda: None)
    return lanes, consumer


def test_a_full_lane_has_no_room_and_the_others_have() -> None:
    lanes, _ = make()
    lanes.enter("train")
    assert not lanes.has_room("train")
    assert lanes.has_room("generate")
    assert lanes.load() == {"generate": (0, 3), "train": (1, 1)}


def test_a_worker_that_stops_says_that_it_has_no_room() -> None:
    lanes, _ = make()
    for _ in range(2):
        lanes.enter("generate")
    lanes.close()
    assert lanes.load() == {"generate": (2, 2), "train": (0, 0)}
    lanes.leave("generate")
    assert lanes.load() == {"generate": (1, 1), "train": (0, 0)}


def test_the_loop_is_woken_when_a_full_lane_has_room_again_and_not_for_every_job() -> None:
    lanes, consumer = make()
    for _ in range(3):
        lanes.enter("generate")
    assert consumer.looks == 0
    for _ in range(3):
        lanes.leave("generate")
        assert lanes.has_room("generate")
    assert consumer.looks == 1


@given(st.lists(st.tuples(st.sampled_from(list(LIMITS)), st.sampled_from(["enter", "leave"])), max_size=60))
def test_after_any_traffic_a_lane_is_open_if_and_only_if_it_has_room(actions: list[tuple[str, str]]) -> None:
    """A broker is asked for no job of a lane that is full, and the loop knows of each one that is full no more."""
    lanes, consumer = make()
    held, woken = dict.fromkeys(LIMITS, 0), 0
    for kind, action in actions:
        if action == "enter" and lanes.has_room(kind):
            lanes.enter(kind)
            held[kind] += 1
        elif action == "leave" and held[kind]:
            woken += held[kind] == LIMITS[kind]
            lanes.leave(kind)
            held[kind] -= 1
        assert all(lanes.has_room(each) == (held[each] < LIMITS[each]) for each in LIMITS)
    assert lanes.load() == {kind: (held[kind], LIMITS[kind]) for kind in LIMITS}
    assert consumer.looks == woken


def test_after_a_reconnection_a_full_lane_is_still_full_and_wakes_the_new_loop(context: WorkerContext) -> None:
    lanes, old = context.lanes, FakeConsumer()
    lanes.configure(LIMITS, QUEUES)
    lanes.wake = lambda: old.call_soon(lambda: None)
    lanes.enter("train")
    again = FakeConsumer(context)
    LaneStep(again).start(again)
    assert not lanes.has_room("train")
    lanes.leave("train")
    assert (old.looks, again.looks) == (0, 1)
    assert lanes.has_room("train")


@pytest.fixture
def traffic(context: WorkerContext, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a request of the lane does, with Celery's own request left out."""
    seen: list[str] = []
    base = LaneRequest.__mro__[1]

    def begin(self: Any, *_: Any, **__: Any) -> None:
        self._type, self._request_dict = "stoker.train", {}
        self._message = SimpleNamespace(delivery_tag="tag", delivery_info={"routing_key": "stoker.m.train"})
        self._app = SimpleNamespace(context=context)

    monkeypatch.setattr(base, "__init__", begin)
    monkeypatch.setattr(base, "name", property(lambda self: "stoker.train"), raising=False)
    monkeypatch.setattr(base, "acknowledge", lambda self: seen.append("ack"))
    monkeypatch.setattr(base, "reject", lambda self, requeue=False: seen.append(f"reject {requeue}"))
    monkeypatch.setattr(context.lanes, "enter", lambda kind: seen.append(f"enter {kind}"))
    monkeypatch.setattr(context.lanes, "leave", lambda kind: seen.append(f"leave {kind}"))
    return seen


def test_a_request_holds_its_place_from_being_taken_until_it_is_acked(traffic: list[str]) -> None:
    request = LaneRequest()
    request.acknowledge()
    request.acknowledge()
    assert traffic == ["enter train", "ack", "leave train", "ack"]


def test_a_request_that_goes_back_gives_up_its_place_once(traffic: list[str]) -> None:
    request = LaneRequest()
    request.reject(requeue=True)
    request.acknowledge()
    assert traffic == ["enter train", "reject True", "leave train", "ack"]


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("end", ["acknowledge", "reject"])
def test_a_request_that_has_ended_is_forgotten(context: WorkerContext, end: str) -> None:
    """Else it would stay in memory, and the lease of its message would be renewed for ever."""
    request = LaneRequest()
    assert context.deliveries.tags() == {"tag"}
    getattr(request, end)()
    assert context.deliveries.tags() == set()


@pytest.fixture
def acked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tags that are forgotten in this process alone."""
    found: list[str] = []
    monkeypatch.setattr("workers.celery.lanes.QoS.ack", lambda qos, tag: found.append(tag))
    return found


def deliver() -> Any:
    request = LaneRequest()
    request.message.channel = SimpleNamespace(qos=None)
    request._on_ack = request._on_reject = lambda *_: pytest.fail("the other owner's message was acknowledged")
    return request


@pytest.mark.usefixtures("traffic")
def test_a_fenced_request_forgets_its_message_and_acknowledges_nothing(acked: list[str]) -> None:
    request = deliver()
    request.fence()
    request._on_ack()
    request._on_reject()
    assert acked == ["tag", "tag"]


@pytest.mark.usefixtures("traffic")
def test_a_fenced_request_leaves_the_tag_to_a_newer_delivery_that_holds_it(acked: list[str]) -> None:
    """A worker that was frozen gets its own message again."""
    older, newer = deliver(), deliver()
    older.fence()
    older._on_ack()
    assert acked == []
    newer.acknowledge()
    older._on_ack()
    assert acked == ["tag"]


def test_a_lane_whose_jobs_did_not_fit_into_memory_holds_half_as_many_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes, consumer = make()
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    for _ in range(2):
        lanes.enter("generate")
    for _ in range(2):
        lanes.shrink("generate")
    assert lanes.load()["generate"] == (2, 1), "jobs that failed together shrink it once"
    assert not lanes.has_room("generate")
    lanes.leave("generate")
    assert not lanes.has_room("generate")
    lanes.leave("generate")
    assert lanes.has_room("generate")
    lanes.enter("generate")
    assert not lanes.has_room("generate")
    looks = consumer.looks
    lanes.grow()
    assert lanes.load()["generate"] == (1, 1), "not yet"
    clock.now += capacity.GROW_AFTER
    lanes.grow()
    assert lanes.load()["generate"] == (1, 2)
    assert lanes.has_room("generate")
    assert consumer.looks == looks + 1
    clock.now += capacity.GROW_AFTER
    lanes.grow()
    assert lanes.load() == {"generate": (1, 3), "train": (0, 1)}


def test_lanes_that_run_out_of_memory_together_all_hold_half_as_many_and_grow_again_each_in_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The jobs of one that is left as it is would use up their tries within a second."""
    lanes, _ = make()
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    lanes.configure({"generate": 8, "embed": 4}, {"generate": ["g"], "embed": ["e"]})
    lanes.shrink("generate")
    clock.now += capacity.SHRINK_AFTER / 2
    lanes.shrink("embed")
    assert lanes.load() == {"generate": (0, 4), "embed": (0, 2)}
    clock.now += capacity.GROW_AFTER - 0.5
    lanes.grow()
    assert lanes.load() == {"generate": (0, 8), "embed": (0, 2)}
    clock.now += 0.5
    lanes.grow()
    assert lanes.load() == {"generate": (0, 8), "embed": (0, 4)}


def test_a_lane_whose_next_job_does_not_fit_holds_no_more_until_one_of_the_others_has_ended() -> None:
    lanes, consumer = make()
    lanes.configure({"train": 3}, {"train": ["q"]})
    for _ in range(2):
        lanes.enter("train")
    lanes.hold_back("train", 1, "too large")
    assert lanes.held_back == {"train": "too large"}
    lanes.leave("train")
    assert (lanes.load(), lanes.has_room("train"), consumer.looks) == ({"train": (1, 1)}, False, 0)
    lanes.leave("train")
    assert (lanes.load(), lanes.has_room("train"), consumer.looks) == ({"train": (0, 3)}, True, 1)
    assert lanes.held_back == {}


def test_a_lane_whose_other_jobs_ended_before_the_one_that_did_not_fit_is_open_again() -> None:
    lanes, consumer = make()
    lanes.configure({"train": 3}, {"train": ["q"]})
    for _ in range(3):
        lanes.enter("train")
    for _ in range(2):
        lanes.leave("train")
    looks = consumer.looks
    lanes.hold_back("train", 2, "too large")
    lanes.leave("train")
    assert (lanes.load(), lanes.held_back) == ({"train": (0, 3)}, {})
    assert consumer.looks == looks + 1


def test_where_memory_ran_out_no_job_is_taken_in_addition() -> None:
    lanes, _ = make()
    for _ in range(3):
        lanes.enter("generate")
    lanes.lend("generate", 4)
    lanes.shrink("generate")
    assert not lanes.has_room("generate")


@given(st.lists(st.integers(0, 3), max_size=40))
def test_a_lane_that_was_held_back_is_never_closed_for_good(actions: list[int]) -> None:
    """In any order of ends and refusals: once the lane is empty it is open again, and the loop was woken."""
    lanes, consumer = make()
    lanes.configure({"train": 4}, {"train": ["q"]})
    held, refused = 0, 0
    for action in actions:
        if action in (0, 1) and lanes.has_room("train"):
            lanes.enter("train")
            held += 1
        elif action == 2 and held - refused > 0:
            lanes.leave("train")
            held -= 1
        elif action == 3 and held - refused > 1:
            lanes.hold_back("train", held - refused - 1, "too large")
            refused += 1
    looks, was_closed = consumer.looks, not lanes.has_room("train")
    for _ in range(held):
        lanes.leave("train")
    assert lanes.load() == {"train": (0, 4)}
    assert lanes.held_back == {}
    assert consumer.looks > looks or not was_closed


def test_a_lane_is_halved_once_for_all_jobs_that_failed_together_and_never_holds_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes, _ = make()
    lanes.configure({"generate": 8}, {"generate": ["q"]})
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    limits = []
    for _ in range(5):
        for _ in range(3):
            lanes.shrink("generate")
        limits.append(lanes.load()["generate"][1])
        clock.now += capacity.SHRINK_AFTER
    assert limits == [4, 2, 1, 1, 1]
