"""Bulk makes way for streams of other workers on the same device: how long it rests, and what it never waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import making_way
from engine.engine import Engine
from engine.generation.limits import LaneLimits
from engine.generation.pacing import LanePacer
from engine.making_way import LINGER, LONGEST_REST, SHARE, MakingWay
from engine.ticket import StepOutput, Ticket
from stoker.contract import GenerateRequest
from stoker.errors import JobCancelled, WorkerUnavailable
from tests.conftest import wait_until

TINY = Path(__file__).parents[1] / "goldens" / "architectures" / "qwen3"
STREAM, BULK = 5, 9


class Neighbour:
    """Another worker, with a stream of the priority `runs`. `heard`: what this one announced to it."""

    def __init__(self, runs: int | None = None) -> None:
        self.runs, self.heard = runs, [0] * 0

    def announce(self, priority: int | None) -> None:
        self.heard.append(-1 if priority is None else priority)

    def is_ahead(self, priority: int) -> bool:
        return self.runs is not None and self.runs < priority


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lane(kind: str, *priorities: int) -> Any:
    held = [SimpleNamespace(ticket=SimpleNamespace(priority=priority)) for priority in priorities]
    return SimpleNamespace(kind=kind, busy=bool(held), held=held)


def steps(way: MakingWay, clock: Clock, lanes: dict[str, Any], seconds: float, step: float) -> int:
    """How many steps lanes that make way take in so many seconds."""
    until, taken = clock.now + seconds, 0
    while clock.now < until:
        behind = way.behind(lanes)
        if behind and not way.rest:
            clock.now += step
            way.note(lanes[min(behind)].kind, step)
            taken += 1
        else:
            clock.now += 0.01
    return taken


def test_a_lane_that_makes_way_has_a_share_of_the_time_and_goes_on() -> None:
    clock = Clock()
    way = MakingWay(Neighbour(STREAM), 0.2, clock)
    bulk = {"bulk": lane("generate", BULK)}
    taken = steps(way, clock, bulk, 1000, 0.1)
    assert taken == pytest.approx(1000 * SHARE / 0.1, rel=0.1)
    clock.now += 1000
    taken = steps(way, clock, bulk, 1000, 5.0)
    assert taken == pytest.approx(1000 / (LONGEST_REST + 5.0), rel=0.1), (
        "a step that takes long is no reason to rest for ever"
    )
    clock.now += 1000
    taken = steps(way, clock, {"run": lane("train", BULK)}, 1000, 5.0)
    assert taken == pytest.approx(1000 * 0.2 / 5.0, rel=0.1), "training has what it has next to a stream of its worker"


@pytest.mark.parametrize(("here", "there", "behind"), [
    ((9,), 5, True), ((5, 9), 5, False), ((5,), 4, True), ((4,), 5, False), ((9,), None, False), ((0,), 0, False),
])  # fmt: skip
def test_a_lane_is_behind_whose_best_job_is_worse_than_a_neighbours_stream(
    here: tuple[int, ...], there: int | None, behind: bool
) -> None:
    way, lanes = MakingWay(Neighbour(there), 0.2), {"lane": lane("generate", *here)}
    assert bool(way.behind(lanes)) is behind
    idle = {"idle": lane("generate")}
    assert not way.behind(idle)


def test_a_worker_with_a_stream_as_good_shares_the_device_as_it_is() -> None:
    """Else the bulk of two workers with a stream each would rest for the other's."""
    neighbour = Neighbour(STREAM)
    way, lanes = MakingWay(neighbour, 0.2), {"a": lane("generate", STREAM), "b": lane("embed", BULK)}
    assert way.behind(lanes) == {"b"}
    way.announce(lanes)
    assert not way.behind(lanes)
    neighbour.runs = STREAM - 1
    assert way.behind(lanes) == {"a", "b"}


def test_neighbours_hear_of_the_best_stream_and_of_no_other_work() -> None:
    neighbour = Neighbour()
    way = MakingWay(neighbour, 0.2)
    way.announce({"a": lane("generate", 7, 6), "b": lane("generate", 8), "c": lane("embed", 1), "d": lane("train", 0)})
    way.announce({"a": lane("generate"), "c": lane("embed", 1)})
    assert neighbour.heard == [6, -1]


def test_between_two_requests_of_a_neighbour_bulk_still_rests_and_not_much_longer() -> None:
    clock, neighbour = Clock(), Neighbour(STREAM)
    way = MakingWay(neighbour, 0.2, clock)
    assert way.is_behind(BULK)
    neighbour.runs = None
    clock.now += LINGER - 0.01
    assert way.is_behind(BULK)
    assert not way.is_behind(STREAM), "that was none ahead of it"
    clock.now += 0.02
    assert not way.is_behind(BULK)


def test_a_worker_that_stops_rests_no_more() -> None:
    way = MakingWay(Neighbour(STREAM), 0.2)
    assert way.is_behind(BULK)
    way.end()
    assert not way.is_behind(BULK)


def test_a_device_of_ones_own_has_no_neighbour() -> None:
    way = MakingWay(None, 0.2)
    way.announce({})
    assert not way.is_behind(9)


def test_a_prompt_that_holds_others_up_goes_in_short_chunks() -> None:
    pacer = LanePacer(stall=0.25)
    pacer.begin({BULK})
    assert pacer.chunk(BULK, decoding=False).patience == 1.0
    pacer.begin({BULK}, alone=False)
    assert pacer.chunk(BULK, decoding=False).patience == 0.125


class Shared:
    """An engine next to a neighbour. Bulk of it has one step, and rests for hours after it."""

    def __init__(self, folder: Path) -> None:
        self.neighbour, self.steps = Neighbour(), [("", 0)] * 0
        self.engine = Engine(
            {"tiny": [str(TINY)]},
            adapters=folder,
            publish=lambda entries: None,
            limits=LaneLimits(slots=4, compiled="none", lookup=False),
            neighbours=self.neighbour,
        )
        self.engine.observe = self._note
        self.stepped = threading.Event()

    def _note(self, model: str, kind: str, seconds: float, output: StepOutput) -> None:
        self.steps.append((kind, output.rows))
        self.stepped.set()

    def send(self, priority: int, tokens: int) -> Ticket[Any]:
        request = GenerateRequest(
            model="tiny", prompt_ids=(3, 7), max_tokens=tokens, ignore_eos=True, priority=priority
        )
        return self.engine.submit(f"p{priority}", request)

    def resting(self) -> Ticket[Any]:
        """A job of bulk that had its step, and rests."""
        self.neighbour.runs = STREAM
        bulk = self.send(BULK, 40)
        wait_until(lambda: self.steps, "it has had a step")
        return bulk


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shared]:
    monkeypatch.setattr(making_way, "SHARE", 1e-9)
    monkeypatch.setattr(making_way, "LONGEST_REST", 1e9)
    monkeypatch.setattr(making_way, "LINGER", 1e-6)
    made = Shared(tmp_path)
    made.engine.start()
    made.steps.clear()
    yield made
    made.engine.stop()


def test_bulk_rests_while_a_stream_as_good_as_the_neighbours_runs_at_once(shared: Shared) -> None:
    bulk = shared.resting()
    assert shared.engine.makes_way(BULK)
    assert len(shared.steps) == 1
    assert shared.send(STREAM, 30).result(30)
    assert not bulk.done, "with no stream here any more it rests again"
    shared.neighbour.runs = None
    assert bulk.result(30).usage.completion_tokens == 40


def test_while_it_rests_bulk_can_be_cancelled(shared: Shared) -> None:
    bulk = shared.resting()
    bulk.cancel()
    shared.engine.wake()
    with pytest.raises(JobCancelled):
        bulk.result(30)
    assert len(shared.steps) == 1


def test_a_resting_engine_stops_at_once_and_its_jobs_go_elsewhere(shared: Shared) -> None:
    bulk = shared.resting()
    shared.engine.stop(30)
    with pytest.raises(WorkerUnavailable):
        bulk.result(0)
    assert len(shared.steps) == 1


def test_bulk_that_rested_ends_within_the_grace_of_its_worker(shared: Shared) -> None:
    bulk = shared.resting()
    shared.engine.hurry()
    assert bulk.result(30).usage.completion_tokens == 40


def test_neighbours_hear_when_a_stream_begins_and_when_the_last_one_has_ended(shared: Shared) -> None:
    shared.neighbour.heard.clear()
    assert shared.send(STREAM, 5).result(30)
    wait_until(lambda: shared.neighbour.heard[-1:] == [-1], "it has ended")
    assert STREAM in shared.neighbour.heard


def test_a_step_that_makes_way_leaves_no_pass_on_the_device(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = shared.engine.lane("tiny", "generate")
    whole, seen = generate.run, [False] * 0

    def run(*, lookahead: bool) -> StepOutput:
        seen.append(lookahead)
        return whole(lookahead=lookahead)

    monkeypatch.setattr(generate, "run", run)
    shared.resting().cancel()
    shared.engine.wake()
    shared.neighbour.runs = None
    assert shared.send(BULK, 3).result(30)
    assert not seen[0]
    assert all(seen[1:])
