"""Fair share: lanes get the engine's time by weight, and idleness earns nothing."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import fair
from engine.fair import FairShare

LANES = "abc"
WEIGHTS = st.fixed_dictionaries({lane: st.integers(1, 8).map(float) for lane in LANES})
COSTS = st.lists(st.integers(1, 10).map(float), min_size=1, max_size=7)


class Clock:
    """`time.perf_counter`, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.module = SimpleNamespace(perf_counter=lambda: self.now)


def run(share: FairShare[str], clock: Clock, busy: str, cost: float, used: Counter[str]) -> str:
    chosen = share.choose(busy)
    assert chosen is not None
    with share.charge(chosen):
        clock.now += cost
    used[chosen] += cost  # type: ignore[assignment]
    return chosen


@given(WEIGHTS, COSTS)
def test_time_is_shared_by_weight_at_every_cost_of_a_step(weights: dict[str, float], costs: list[float]) -> None:
    """Goyal's bound: two busy lanes differ by at most one longest step of each."""
    clock, used = Clock(), Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fair, "time", clock.module)
        share = FairShare(weights)
        for step in range(200):
            run(share, clock, LANES, costs[step % len(costs)], used)
            for one in LANES:
                for other in LANES:
                    gap = used[one] / weights[one] - used[other] / weights[other]
                    assert abs(gap) <= max(costs) / weights[one] + max(costs) / weights[other] + 1e-9


@given(WEIGHTS, st.integers(1, 200))
def test_a_lane_that_was_idle_does_not_catch_up(weights: dict[str, float], idle: int) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fair, "time", clock.module)
        share = FairShare(weights)
        for _ in range(idle):
            run(share, clock, "ab", 1.0, Counter())
        used = Counter[str]()
        for _ in range(100):
            run(share, clock, "abc", 1.0, used)
        gap = used["c"] / weights["c"] - used["a"] / weights["a"]
        assert abs(gap) <= 1 / weights["c"] + 1 / weights["a"] + 1e-9


@given(WEIGHTS)
def test_no_busy_lane_is_starved(weights: dict[str, float]) -> None:
    clock, used = Clock(), Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fair, "time", clock.module)
        share = FairShare(weights)
        for _ in range(int(2 * sum(weights.values()))):
            run(share, clock, LANES, 1.0, used)
    assert set(used) == set(LANES)


def test_only_a_busy_lane_is_chosen() -> None:
    share = FairShare({"a": 1.0, "b": 1.0})
    assert share.choose([]) is None
    assert share.choose(["b"]) == "b"


def test_a_step_that_fails_is_charged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(fair, "time", clock.module)
    share = FairShare({"a": 1.0, "b": 1.0})
    with suppress(MemoryError), share.charge("a"):
        clock.now += 1.0
        raise MemoryError
    assert share.choose("ab") == "b"


def test_an_urgent_lane_waits_no_longer_than_the_stall_and_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, used = Clock(), Counter[str]()
    monkeypatch.setattr(fair, "time", clock.module)
    share = FairShare({"a": 1.0, "b": 1000.0, "c": 1000.0}, urgent={"a"}, stall=3.0)
    waited = 0.0
    for _ in range(200):
        chosen = run(share, clock, LANES, 1.0, used)
        waited = 0.0 if chosen == "a" else waited + 1.0
        assert waited <= 3.0
    assert used["b"] > 50 < used["c"]


def test_an_urgent_lane_that_was_idle_was_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is ahead, so that its turn is far: all that could have it run before is what others used meanwhile."""
    clock = Clock()
    monkeypatch.setattr(fair, "time", clock.module)
    share = FairShare({"a": 1.0, "b": 1000.0}, urgent={"a"}, stall=3.0)
    assert run(share, clock, "ab", 1.0, Counter()) == "a"
    for _ in range(10):
        run(share, clock, "b", 1.0, Counter())
    assert [run(share, clock, "ab", 1.0, Counter()) for _ in range(4)] == ["b", "b", "a", "b"], (
        "the last step counts: it may have come in it"
    )


def test_a_lane_that_has_run_has_not_been_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another urgent one may: its wait goes on."""
    clock = Clock()
    monkeypatch.setattr(fair, "time", clock.module)
    share = FairShare({"a": 1.0, "b": 1000.0, "c": 1.0}, urgent={"a", "c"}, stall=3.0)
    assert "".join(run(share, clock, "abc", 1.0, Counter()) for _ in range(11)) == "abcbabcbabc"
