"""The run: inputs one after another, several at once, until the time is over; a look at the invariants now and then."""

from __future__ import annotations

import itertools
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import files, grammars, messages, options, stored, texts, uploads
from tests.fuzz.input import Input, Source
from tests.fuzz.invariants import Invariants
from tests.fuzz.neighbour import Neighbour
from tests.fuzz.world import World

#: Each source with how often it is drawn.
SOURCES: dict[str, tuple[Source, float]] = {
    "messages": (messages.draw, 5),
    "keys": (stored.draw, 5),
    "options": (options.draw, 6),
    "grammars": (grammars.draw, 2),
    "files": (files.draw, 2),
    "uploads": (uploads.draw, 2),
    "texts": (texts.draw, 4),
}
#: Inputs that are under way at once, and those between two looks.
WIDTH, LOOK_EVERY = 8, 300


def drawn(seed: int, number: int) -> tuple[str, Input]:
    """The input of that number, and the name of its source: the same for the same two numbers."""
    chance = random.Random(f"{seed} {number}")
    name = chance.choices(list(SOURCES), [weight for _, weight in SOURCES.values()])[0]
    return name, SOURCES[name][0](chance, number)


class Run:
    """`give` the inputs; `wrong` is what went wrong with any of them, `counts` how many there were of each source."""

    def __init__(self, world: World, seed: int) -> None:
        self._world, self._seed = world, seed
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self._room = threading.Semaphore(WIDTH)
        self._pool = ThreadPoolExecutor(WIDTH, thread_name_prefix="fuzz")
        self.neighbour = Neighbour(world)
        self.invariants = Invariants(world)

    def give(self, numbers: Iterable[int], until: float) -> None:
        """Inputs of these numbers until that time of the clock, and a last look."""
        for number in numbers:
            if time.monotonic() >= until:
                break
            if sum(self.counts.values()) % LOOK_EVERY == LOOK_EVERY - 1:
                self.look()
            name, given = drawn(self._seed, number)
            self.counts[name] += 1
            self._start(number, name, given)
        self.look()

    def look(self) -> None:
        self._drain()
        self.neighbour.rest()
        for problem in self.invariants.broken():
            self._say(problem)
        self.neighbour.go_on()
        for problem in self.neighbour.wrong:
            self._say(problem)
        self.neighbour.wrong.clear()

    def close(self) -> None:
        self._pool.shutdown()
        self.neighbour.stop()

    def _start(self, number: int, name: str, given: Input) -> None:
        if given.alone:
            self._drain()
            self.neighbour.flowing.wait(60)
            self._act(number, name, given)
            return
        self._room.acquire()
        self._pool.submit(self._acted, number, name, given)

    def _drain(self) -> None:
        """Until no input is under way."""
        for _ in range(WIDTH):
            self._room.acquire()
        self._room.release(WIDTH)

    def _acted(self, number: int, name: str, given: Input) -> None:
        try:
            self._act(number, name, given)
        finally:
            self._room.release()

    def _act(self, number: int, name: str, given: Input) -> None:
        try:
            problems = given.act(self._world)
        except Exception:
            problems = [f"the input could not be given: {traceback.format_exc()[-2000:]}"]
        for problem in problems:
            self._say(
                f"input {number} ({name}): {given.what}\n    {problem}\n    make fuzz SEED={self._seed} ONLY={number}"
            )

    def _say(self, problem: str) -> None:
        print(f"  VIOLATION {problem}".encode("ascii", "backslashreplace").decode(), flush=True)
        self.wrong.append(problem)


def fuzz(seconds: float, seed: int, folder: Path, only: int | None = None) -> Run:
    """Fuzz for so many seconds, or with one input; prints each violation and a summary."""
    world = World.start(folder / "fuzz")
    try:
        run = Run(world, seed)
        try:
            numbers = itertools.count(1) if only is None else [only]
            run.give(numbers, time.monotonic() + seconds)
        finally:
            run.close()
    finally:
        world.close()
    print(_summary(run, seed), flush=True)
    return run


def _summary(run: Run, seed: int) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in sorted(run.counts.items()))
    looks = run.invariants
    return (
        f"fuzz: seed {seed}, {sum(run.counts.values())} inputs ({counts}), {run.neighbour.streams} streams, "
        f"violations {len(run.wrong)}; the worker's memory {looks.resident[0]:.0f} to {max(looks.resident):.0f} MB, "
        f"threads {looks.threads[0]} to {max(looks.threads)}"
    )
