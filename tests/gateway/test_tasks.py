"""Tasks end though a library loses a cancel."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from stoker.gateway import tasks


def test_a_task_whose_cancel_got_lost_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "ONCE_MORE", 0.01)

    async def deaf() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def run() -> bool:
        task = asyncio.ensure_future(deaf())
        await asyncio.sleep(0)
        await asyncio.wait_for(tasks.ended([task]), 10)
        await tasks.ended([])
        return task.cancelled()

    assert asyncio.run(run())
