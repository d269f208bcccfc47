"""The gateways that tests start."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from starlette.types import Receive, Scope, Send

from tests.gateway.machinery import Served


def test_what_goes_on_besides_requests_is_of_the_gateway_that_a_server_was_made_with() -> None:
    """Also where its thread comes to that behind `over`: the other gateway ends before the server does."""
    asked: set[str] = set()

    def named(name: str) -> Any:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            asked.add(f"{scope['type']} of {name}")

        return SimpleNamespace(application=lambda: answer)

    served = Served(named("first"))
    served.over(named("second"))
    for kind in ("lifespan", "http"):
        asyncio.run(served._serve({"type": kind}, Mock(), Mock()))  # noqa: SLF001  as the server does
    served.stop()
    assert asked == {"lifespan of first", "http of second"}
