"""The simulation of a fleet agrees with what is known of queues, and with itself."""

from __future__ import annotations

from math import factorial

import pytest

from bench.scale import BATCH, Cell, Costs, Plan, bears, fleet, load, needs

COSTS = Costs(
    submit=100e-6,
    claim=90e-6,
    complete=50e-6,
    rest=400e-6,
    step=60e-6,
    token=8e-6,
    heard=3e-6,
    worker=2e-3,
    stream=9e-6,
)
FREE = Costs(0, 0, 0, 0, 0, 0, 0, 0, 0)
PLAN = Plan(workers=8, slots=40, rate=20.0, tokens=50.0, arrivals=100.0)


def test_the_same_seed_makes_the_same_fleet_and_another_one_another() -> None:
    first, again, other = (Cell(COSTS, PLAN, seed).run(3.0) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_streams_at_once_are_those_that_come_a_second_times_how_long_they_live() -> None:
    """Little's law (1961)."""
    found = Cell(COSTS, PLAN, 3).run(60.0, warm_up=15.0)
    ended, lived = len(found.lives) / found.seconds, sum(found.lives) / len(found.lives)
    assert found.running == pytest.approx(ended * lived, rel=0.02)
    assert found.running == pytest.approx(PLAN.streams, rel=0.05)
    assert lived == pytest.approx(PLAN.tokens / PLAN.rate, rel=0.03)


def test_a_broker_is_as_busy_as_what_it_is_asked_for_costs() -> None:
    found = Cell(COSTS, PLAN, 4).run(30.0)
    assert found.busy == pytest.approx(load(COSTS, PLAN), rel=0.03)
    assert found.keeps_up
    assert found.sent == pytest.approx(30.0 * PLAN.tokens_a_second, rel=0.05)


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_submissions_alone_wait_as_in_an_m_d_1_queue(busy: float) -> None:
    """Pollaczek and Khinchine, for a service that always takes as long: rho / (2 (1 - rho)) services."""
    service = 100e-6
    only = Plan(workers=0, arrivals=busy / service)
    found = Cell(Costs(service, 0, 0, 0, 0, 0, 0, 0, 0), only, 5).run(5.0)
    assert found.busy == pytest.approx(busy, rel=0.02)
    assert sum(found.waits) / len(found.waits) == pytest.approx(service * busy / (2 * (1 - busy)), rel=0.08)


@pytest.mark.parametrize(("slots", "arrivals"), [(2, 1.2), (6, 3.6)])
def test_streams_wait_for_slots_as_in_an_m_m_c_queue(slots: int, arrivals: float) -> None:
    """Erlang's C: how likely a stream waits, and for how long on average. A life of 20 steps is nearly exponential."""
    plan = Plan(workers=1, slots=slots, rate=20.0, tokens=20.0, arrivals=arrivals)
    found = Cell(FREE, plan, 0).run(8000.0)
    life = sum(found.lives) / len(found.lives)
    offered = len(found.queued) / found.seconds * life
    full = offered**slots / factorial(slots) / (1 - offered / slots)
    waits = full / (sum(offered**n / factorial(n) for n in range(slots)) + full)
    assert sum(wait > 0 for wait in found.queued) / len(found.queued) == pytest.approx(waits, rel=0.05)
    assert sum(found.queued) / len(found.queued) == pytest.approx(waits * life / (slots - offered), rel=0.12)


def test_a_broker_that_is_asked_for_too_much_is_busy_all_the_time_and_does_not_keep_up() -> None:
    """Its scripts grow to the most that one carries, which is what it gains by being late."""
    plan = Plan(workers=60, slots=110, rate=20.0, tokens=400.0, arrivals=300.0)
    assert load(COSTS, plan) > 1.3
    found = Cell(COSTS, plan, 7).run(5.0)
    assert found.busy == pytest.approx(1.0, abs=1e-6)
    assert not found.keeps_up
    assert found.left > BATCH
    assert found.delay(50) > 0.1


def test_no_stream_is_lost() -> None:
    cell = Cell(COSTS, PLAN, 8)
    found = cell.run(10.0)
    assert cell.arrived > PLAN.arrivals * 10
    assert 0 < cell.open <= PLAN.workers * PLAN.slots + PLAN.arrivals
    assert len(found.lives) <= cell.ended <= cell.arrived


def test_costs_are_fitted_to_the_rows_and_give_what_one_broker_bears() -> None:
    queue = {"transition: submit": 100.0, "transition: claim": 90.0, "transition: complete": 60.0}
    scale = {f"publishing a step of {rows} tokens": 50.0 + 8.0 * rows for rows in (1, 32, 128)} | {
        "a token to one more reader": 4.0, "a job of two tokens, whole": 774.0, "a second of an idle worker": 2000.0,
        "a second of a running stream": 10.0, "a token from its worker": 400.0, "a token to a reader": 300.0,
        "a token that is kept": 120.0,
    }  # fmt: skip
    costs = Costs.of(queue, scale)
    assert costs.step == pytest.approx(50e-6)
    assert costs.token == pytest.approx(8e-6)
    assert costs.rest == pytest.approx(400e-6)
    assert costs.job == pytest.approx(650e-6)
    found = {row.name: row.p50 for row in bears(costs)}
    assert found["one broker bears: tokens of 100 streams a worker, 1 reader"] == pytest.approx(1 / 12.5e-6)
    asked = {row.name: row.p50 for row in needs(costs, Plan())}
    parts = [value for name, value in asked.items() if "of these" in name]
    assert sum(parts) == pytest.approx(asked["the fleet needs: cores of brokers"])
    assert asked["the fleet needs: memory of streams, kept for a day"] == pytest.approx(2e6 * 86400 * 120 / 1e9)


def test_the_committed_rows_are_all_that_the_simulation_needs() -> None:
    costs = Costs.committed()
    assert min(costs.job, costs.token, costs.heard, costs.worker, costs.bytes_kept) > 0
    rows = fleet(costs, Plan(workers=20, slots=12, arrivals=10.0), 2, 0.5)
    assert {row.name.partition(": ")[0] for row in rows} == {"2 brokers"}
