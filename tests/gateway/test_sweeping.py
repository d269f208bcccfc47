"""Parts of files that are gone are looked for again and again, also behind a look that failed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stoker.errors import BrokerUnavailable
from stoker.gateway import sweeping


@pytest.mark.parametrize("trouble", [BrokerUnavailable("the broker is away"), OSError(30, "Read-only file system")])
def test_a_look_that_fails_is_said_and_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    monkeypatch.setattr(sweeping, "SWEEP_EVERY", 0.0)
    looked: list[int] = []

    class Store:
        async def sweep(self) -> None:
            looked.append(len(looked))
            if len(looked) == 1:
                raise trouble
            if len(looked) == 3:
                raise KeyError("a defect ends it")

    store: Any = Store()
    with pytest.raises(KeyError):
        asyncio.run(sweeping.sweep_for_ever(store))
    assert looked == [0, 1, 2]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"parts of files that are gone are not deleted now: {trouble}"
