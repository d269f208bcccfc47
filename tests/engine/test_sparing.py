"""A load next to running streams: what of it waits for how many of their steps, and what it never waits for."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import sparing
from engine.checkpoints.loading import load
from engine.engine import Engine
from engine.generation.limits import LaneLimits
from engine.platform.threads import only_own
from engine.sparing import EVERY, Sparing
from engine.ticket import Entry
from engine.warm import WarmModels
from engine.weights.safetensors import entries
from stoker.contract import GenerateRequest
from stoker.errors import WorkerUnavailable
from tests.conftest import wait_until
from tests.engine import bridged

TINY = Path(__file__).parents[1] / "goldens" / "architectures" / "qwen3"
USUAL = 0.005


class Running:
    """Streams of the lane `L` next to loads, by a clock that is moved by hand."""

    def __init__(self, known: int = 120) -> None:
        self.now = 100.0
        self.sparing = Sparing(lambda: self.now)
        self.sparing.stepped("L", ["L"])
        for _ in range(known):
            self.step()

    def step(self, seconds: float = USUAL, lane: str = "L") -> None:
        self.now += seconds
        self.sparing.stepped(lane, ["L"])

    def load(self, *steps: float) -> None:
        """One piece of a load, during which there are these steps."""
        with self.sparing.loading():
            for seconds in steps:
                self.step(seconds)

    def steps_until_free(self) -> int:
        taken = 0
        while not self.sparing.free:
            self.step()
            taken += 1
        return taken


@pytest.mark.parametrize(("steps", "wait"), [
    ([0.03], EVERY), ([0.03, 0.03], 2 * EVERY - 1), ([0.011], EVERY), ([0.009], 1), ([USUAL] * 500, 1), ([], 1),
    ([0.03] + [USUAL] * 100, EVERY - 100),
])  # fmt: skip
def test_behind_each_late_step_streams_have_so_many_before_the_next_piece(steps: list[float], wait: int) -> None:
    running = Running()
    running.load(*steps)
    assert running.steps_until_free() == wait


def test_of_the_steps_of_a_load_fewer_than_one_in_a_hundred_is_late() -> None:
    running, late, taken = Running(), 0, 0
    for _ in range(20):
        running.load(0.1)
        late += 1
        taken += 1 + running.steps_until_free()
    assert late / taken < 0.01


def test_what_is_slow_without_a_load_is_not_held_against_one() -> None:
    running = Running()
    running.step(0.5)
    assert running.sparing.free
    for _ in range(99):
        running.step()
    running.step(0.08)
    running.load(0.15)
    assert running.steps_until_free() == 1, "all except one in a hundred took up to half as long"


def test_what_steps_took_is_forgotten_behind_two_hundred_others() -> None:
    running = Running()
    for _ in range(4):
        running.step(0.5)
    running.load(0.03)
    assert running.steps_until_free() == 1
    for _ in range(sparing.RECENT):
        running.step()
    running.load(0.03)
    assert running.steps_until_free() == EVERY


def test_where_nobody_streams_each_piece_begins_at_once() -> None:
    running = Running()
    running.load(0.03)
    running.sparing.idle()
    assert running.sparing.free
    running = Running()
    running.load(0.03)
    running.sparing.stepped("L", [])
    assert running.sparing.free, "the last stream has ended"


def test_the_first_steps_of_streams_that_have_just_begun_are_not_judged() -> None:
    running = Running(known=0)
    running.load(0.5)
    assert running.steps_until_free() == 1


def test_steps_of_training_are_no_streams() -> None:
    running = Running()
    with running.sparing.loading():
        running.step(0.5, lane="train")
    assert running.steps_until_free() == 1


def test_a_new_load_owes_nothing_for_the_last_one() -> None:
    running = Running()
    running.load(0.03, 0.03, 0.03)
    running.load()
    assert running.steps_until_free() == 1


def ends(call: Callable[[], object]) -> bool:
    """Whether it ends though no stream has a step."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def test_pieces_that_take_no_longer_together_than_a_step_are_one() -> None:
    running = Running()
    with running.sparing.loading():
        for _ in range(4):
            running.now += USUAL / 5
            assert ends(running.sparing.pause)
        assert not running.sparing.free


def test_a_load_waits_no_longer_than_it_may_and_an_engine_that_ends_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparing, "LONGEST", 0.0)
    running = Running()
    with running.sparing.loading():
        running.step(0.5)
        assert ends(running.sparing.pause)
    monkeypatch.undo()
    running = Running()
    running.load(0.5)
    running.sparing.end()
    assert running.sparing.free


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_a_load_collects_what_it_made_and_looks_at_nothing_else() -> None:
    cycle = Cycle()
    before = weakref.ref(cycle)
    gc.collect()  # it is an old one now
    del cycle
    with only_own():
        own = weakref.ref(Cycle())
        assert not gc.isenabled()
    assert gc.isenabled()
    assert own() is None
    assert before() is not None
    gc.collect()
    assert before() is None


class Loading:
    """An engine whose streams owe a load nothing any more, and whose every step is late next to one."""

    def __init__(self, folder: Path) -> None:
        self.tokens = 0
        limits = LaneLimits(slots=1, lookup=False)
        self.engine = Engine({"first": [str(TINY)]}, adapters=folder, publish=self._publish, limits=limits)
        self.error: list[Exception] = []
        self.thread = threading.Thread(target=self._load)

    def _publish(self, entries: list[Entry]) -> None:
        self.tokens += len(entries)

    def _load(self) -> None:
        try:
            self.engine.load("second", [str(TINY)])
        except WorkerUnavailable as error:
            self.error.append(error)

    def begin(self) -> None:
        request = GenerateRequest(model="first", prompt_ids=(3, 7), max_tokens=120, ignore_eos=True)
        # One after the other.
        self.streams = [self.engine.submit(f"s{number}", request) for number in range(40)]
        wait_until(lambda: self.tokens > 3, "the stream runs")
        self.thread.start()
        before = self.tokens
        wait_until(lambda: self.tokens > before + 30, "the stream goes on")


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loading]:
    monkeypatch.setattr(sparing, "LATE", 0.0)
    monkeypatch.setattr(sparing, "EVERY", 1_000_000)
    monkeypatch.setattr(sparing, "LONGEST", 1000.0)
    made = Loading(tmp_path)
    made.engine.start()
    made.engine.load("other", [str(TINY)])
    yield made
    made.engine.stop()
    made.thread.join(20)


def test_a_load_waits_for_streams_and_goes_on_when_they_have_ended_and_an_unload_waits_for_none(
    loading: Loading,
) -> None:
    loading.begin()
    assert loading.engine.unload("other")
    assert "second" not in loading.engine.models
    for stream in loading.streams:
        stream.cancel()
    loading.engine.wake()
    loading.thread.join(60)
    assert "second" in loading.engine.models
    assert not loading.error


def test_an_engine_that_stops_ends_a_load_that_waits(loading: Loading) -> None:
    loading.begin()
    loading.engine.stop(30)
    loading.thread.join(60)
    assert loading.error


def test_a_load_pauses_between_all_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def slices(name: str) -> Callable[..., Iterator[None]]:
        def each(*given: object) -> Iterator[None]:
            for _ in range(2):
                done.append(name)
                yield

        return each

    monkeypatch.setattr(Sparing, "pause", lambda _: done.append("pause"))
    engine = Engine({}, adapters=tmp_path, publish=lambda entries: None)
    engine.start()
    try:
        monkeypatch.setattr(WarmModels, "rehearsing", slices("rehearses"))
        monkeypatch.setattr(WarmModels, "hold", slices("warms"))
        engine.load("second", [str(TINY)])
    finally:
        engine.stop()
    assert done[-9:] == ["rehearses", "pause", "rehearses", "pause", "pause", "warms", "pause", "warms", "pause"]
    reading = done[:-9]
    assert set(reading) == {"pause"}


@pytest.mark.parametrize("kind", ["qwen3", "bert", "bridged"])
def test_a_load_pauses_before_each_tensor(kind: str, tmp_path: Path) -> None:
    folder = TINY.parent / kind
    if kind == "bridged":
        folder = tmp_path / "gemma3_text"
        bridged.write_hub_folder(folder, "gemma3_text")
    pauses: list[int] = []
    load("x", [str(folder)], lambda: pauses.append(1))
    assert len(pauses) > len(entries(folder))
