"""When the runner of batches looks for work: over a store that counts its looks, by a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from stoker.gateway.batch_runner import LOOK_EVERY, Runner
from tests import hurried


class Store:
    """`looks`: when it was asked whether it is used."""

    def __init__(self) -> None:
        self.looks: list[float] = []

    async def is_used(self) -> bool:
        self.looks.append(asyncio.get_running_loop().time() / LOOK_EVERY)
        assert len(self.looks) < 20, "it looks without a pause"
        return False


def looks(during: Callable[[Runner], Any], seconds: float) -> list[float]:
    async def run() -> list[float]:
        store: Any = Store()
        client: Any = None
        runner = Runner(client, client, store, client)
        running = asyncio.ensure_future(runner.run_for_ever())
        during(runner)
        await asyncio.wait({running}, timeout=seconds)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        return store.looks  # type: ignore[no-any-return]

    return hurried.run(run())


def test_the_runner_looks_every_few_seconds() -> None:
    assert looks(lambda runner: None, 3.5 * LOOK_EVERY) == [0, 1, 2, 3]


@pytest.mark.parametrize("times", [1, 5])
def test_a_runner_that_is_woken_looks_at_once_and_then_as_seldom_as_before(times: int) -> None:
    def wake(runner: Runner) -> None:
        for _ in range(times):
            asyncio.get_running_loop().call_later(1.5 * LOOK_EVERY, runner.wake)

    assert looks(wake, 4 * LOOK_EVERY) == [0, 1, 1.5, 2.5, 3.5]
