"""Loading a model next to running streams: how often it may make their tokens late.

A load is done in pieces: a tensor, a tokenizer, the trace of a pass. Some of them cannot be cut, and while one holds
the interpreter's lock, the driver's or the engine's thread, no stream gets a token. So they are spaced: behind a step
that a piece has made late the next piece waits for `EVERY` steps, and of the tokens during a load fewer than one in a
hundred is late. Pieces that make none late follow one another; where no stream runs, no piece waits.

Why steps are counted, where a lane that makes way (`engine.making_way`) rests for a share of the time: there the
streams are another process's, whose steps nobody sees here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

#: Called between two pieces of a load: returns when the next one may begin.
Pause: TypeAlias = Callable[[], None]

#: A late step takes more than so many times what all except one in a hundred take.
LATE = 2.0
#: Steps that streams have behind a late one before the next piece begins.
EVERY = 150
#: Seconds that one load waits for streams at most, all its pieces together.
LONGEST = 30.0
#: Steps of each lane that say what they take where no piece is under way.
RECENT = 200


def no_pause() -> None:
    """Where nobody has to be spared."""


class Sparing:
    """`stepped` and `idle` are for the engine's thread, `loading` and `pause` for those that load, one at a time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        #: Lane that runs streams → seconds of its last steps.
        self._steps: dict[Hashable, deque[float]] = {}
        #: When the engine's last step ended.
        self._ended = 0.0
        #: Steps that streams are to have before the next piece.
        self._owed = 0
        #: Whether a piece is under way; whether one was at any time since the last step ended.
        self._under_way = self._touched = False
        self._began = 0.0
        #: Seconds that the load may still wait.
        self._left = 0.0
        self._over = False

    def stepped(self, turn: Hashable, streams: Collection[Hashable]) -> None:
        """A step of the lane `turn` has ended; `streams`: the lanes that run streams now."""
        with self._changed:
            now = self._clock()
            if turn in self._steps:
                self._judge(self._steps[turn], now - self._ended)
            self._ended = now
            self._steps = {lane: self._steps.get(lane) or deque(maxlen=RECENT) for lane in streams}
            self._look()

    def _judge(self, recent: deque[float], seconds: float) -> None:
        touched, self._touched = self._touched, self._under_way
        self._owed = max(0, self._owed - 1)
        if not touched:
            recent.append(seconds)
        elif recent and seconds > LATE * _longest(recent):
            self._owed += EVERY

    def idle(self) -> None:
        """The engine has nothing to run."""
        with self._changed:
            self._steps = {}
            self._look()

    def end(self) -> None:
        """No load waits from now on: the engine stops. From any thread."""
        with self._changed:
            self._over = True
            self._look()

    def _look(self) -> None:
        if self.free:
            self._changed.notify_all()

    @property
    def free(self) -> bool:
        """Whether a piece may begin: also the step that the last one has touched must have ended."""
        return self._over or not self._steps or not (self._owed or self._touched)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """A load, of which the first piece begins at once."""
        with self._changed:
            self._owed, self._left = 0, LONGEST
            self._begin()
        try:
            yield
        finally:
            with self._changed:
                self._under_way = False

    def pause(self) -> None:
        """Between two pieces. Those that take no longer together than a step are one: they make none late."""
        with self._changed:
            if self._clock() - self._began < min(map(_longest, self._steps.values()), default=0.0):
                return
            self._under_way = False
            self._wait()
            self._begin()

    def _begin(self) -> None:
        self._under_way = self._touched = True
        self._began = self._clock()

    def _wait(self) -> None:
        began = self._clock()
        self._changed.wait_for(lambda: self.free, self._left)
        self._left = max(0.0, self._left - (self._clock() - began))


def _longest(seconds: Collection[float]) -> float:
    """What all except one in a hundred take; 0 where nothing is known."""
    return sorted(seconds)[len(seconds) * 99 // 100] if seconds else 0.0
