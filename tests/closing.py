"""Whether what opens a connection closes it again."""

from __future__ import annotations

from typing import Any

import pytest

from stoker.broker.connection import connect
from stoker.settings import Settings


def noting_closes(monkeypatch: pytest.MonkeyPatch, opener: str) -> list[Any]:
    """The connections that were closed of those which the function `opener` (`module.name`) opens from now on; it does
    what `connect` does."""
    closed: list[Any] = []

    def watched(settings: Settings) -> Any:
        found: Any = connect(settings)
        close = found.close

        def noted() -> None:
            closed.append(found)
            close()

        monkeypatch.setattr(found, "close", noted)
        return found

    monkeypatch.setattr(opener, watched)
    return closed
