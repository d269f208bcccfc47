"""Faults at every call that a lane makes, and what must hold of its tickets at any moment."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from engine.ticket import Ticket


class Fault(Exception):
    """What a test has thrown."""


class Calls:
    """Counts the calls of Python functions that the code of `module` makes; the one numbered `bad` (from 1) fails."""

    def __init__(self, module: ModuleType, bad: int) -> None:
        assert module.__file__ is not None
        self._file, self._bad, self.count = str(Path(module.__file__)), bad, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        caller = frame.f_back
        # A generator is called too when it is thrown away, where nobody sees what it raises.
        plain = event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if plain and caller is not None and caller.f_code.co_filename == self._file and not _collects(frame):
            self.count += 1
            if self.count == self._bad:
                raise Fault(f"call {self.count}: {frame.f_code.co_name}")


def _collects(frame: FrameType) -> bool:
    """Whether this is a callback of the garbage collector, which comes at any moment."""
    return any(frame.f_code is getattr(callback, "__code__", None) for callback in gc.callbacks)


@contextmanager
def failing_call(module: ModuleType, bad: int) -> Iterator[Calls]:
    calls, before = Calls(module, bad), sys.gettrace()
    sys.settrace(calls)
    try:
        yield calls
    finally:
        sys.settrace(before)


class DrivenLane:
    """A lane with all tickets that it ever took, driven as the engine does it and looked at between."""

    lane: Any

    def __init__(self) -> None:
        self.tickets: list[Ticket[Any]] = []

    def check(self, whole: bool = True) -> None:
        """Assert what must hold at any moment; `whole`: where the lane's last call came back."""
        raise NotImplementedError

    def step(self) -> None:
        self.lane.drop_stopped()
        self.check()
        if self.lane.busy:
            for ticket, value in self.lane.run().ended:
                ticket.resolve(value)
        self.check()

    def run(self, most: int = 1000) -> None:
        for _ in range(most):
            if not self.lane.busy:
                return
            self.step()
        raise AssertionError("the lane does not come to an end")


def check_held(tickets: Sequence[Ticket[Any]], held: Sequence[Ticket[Any]], *, whole: bool) -> None:
    """A job that has not ended is held exactly once; one that has is held no more, where the lane is `whole`: where its
    last call came back."""
    for ticket in tickets:
        count = sum(other is ticket for other in held)
        assert count <= 1, f"{ticket.job_id} is held {count} times"
        assert ticket.done or count == 1, f"{ticket.job_id} is lost"
        assert not (whole and ticket.done and count), f"{ticket.job_id} has ended and is held"
