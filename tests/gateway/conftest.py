"""A gateway on loopback, in this process, over a client that works in memory; and the vendors' own packages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import openai
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from stoker.gateway.app import Gateway
from stoker.gateway.command import listening, server
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"


class Served:
    """A gateway that runs in a thread. Starting one takes longer than a test: `over` says what it is over now."""

    def __init__(self) -> None:
        self._app: ASGIApp = Gateway(AsyncFakeClient(settings=Settings())).application()
        listener = listening("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = server(self._serve)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([listener])), daemon=True)
        self._thread.start()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def over(self, gateway: Gateway) -> None:
        self._app = gateway.application()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "the gateway ends"


@pytest.fixture(scope="session")
def running() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture(scope="session")
def package(running: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def fake() -> AsyncFakeClient:
    return AsyncFakeClient(adapters=["house-style"])


@pytest.fixture
def served(running: Served, fake: AsyncFakeClient) -> Served:
    running.over(Gateway(fake))
    return running


@pytest.fixture
def api(served: Served, package: openai.OpenAI) -> openai.OpenAI:
    """OpenAI's client of a gateway over `fake`."""
    return package
