"""An event loop whose clock jumps to the next timer where nothing else is to be done: what takes minutes takes none."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    passed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing more will happen: no timer runs, and every task waits"
        found = super().select(0)
        if not found:
            self.passed += timeout
        return found


class HurriedLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0. For tasks that wait for each other and for the clock alone: no thread, no socket."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.passed


def run(call: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in such a loop."""
    with asyncio.Runner(loop_factory=HurriedLoop) as runner:
        return runner.run(call)
