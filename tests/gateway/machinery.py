"""Gateways that tests start: in a thread of their own process, or as `stoker serve`."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import openai
from starlette.types import Receive, Scope, Send

from stoker import AsyncClient
from stoker.gateway.access import Keyed
from stoker.gateway.app import Gateway
from stoker.gateway.command import listening, server
from stoker.settings import Settings
from tests.conftest import wait_until

T = TypeVar("T")


class Served:
    """A gateway that runs in a thread. Starting one takes longer than a test: `over` says what it is over now."""

    def __init__(self, gateway: Gateway) -> None:
        self._app = self._first = gateway.application()
        listener = listening("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = server(self._serve)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(listener,), daemon=True)
        self._thread.start()

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, ThreadPoolExecutor(1) as executor:
            # Its one thread is there from the beginning, so that it is none that a test has left.
            executor.submit(int).result()
            self._loop.set_default_executor(executor)
            runner.run(self._server.serve([listener]))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Its thread may begin behind `over`. What went on then besides requests would be of a gateway that is to end
        # before the server, and would open its client's connections again.
        app = self._first if scope["type"] == "lifespan" else self._app
        await app(scope, receive, send)

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._server.server_state.connections)

    @property
    def tasks(self) -> int:
        """How many requests run now."""
        return len(self._server.server_state.tasks)

    @property
    def sockets(self) -> list[socket.socket]:
        """Those of its connections."""
        return [one.transport.get_extra_info("socket") for one in list(self._server.server_state.connections)]

    def over(self, gateway: Gateway) -> None:
        self._app = gateway.application()

    @contextmanager
    def lent(self, gateway: Gateway, broker: AsyncClient, secret: str = "none") -> Iterator[openai.OpenAI]:
        """It is over a gateway for a while, with all that goes on in that besides requests. OpenAI's client of it."""
        before, self._app = self._app, gateway.application()
        enough = asyncio.Event()
        going_on = asyncio.run_coroutine_threadsafe(_in_background(gateway, enough), self._loop)
        try:
            with self.opened(secret) as api:
                yield api
        finally:
            self._loop.call_soon_threadsafe(enough.set)
            going_on.result(30)
            self._app = before
            self.closing(broker)

    def opened(self, secret: str) -> openai.OpenAI:
        """OpenAI's client, with a key of its own."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret, max_retries=0, timeout=20)

    def closing(self, client: AsyncClient) -> None:
        """Close a client that requests have used, in their event loop, once none of them runs any more: what they do
        behind their answers would open its connections again."""
        wait_until(lambda: not self.tasks, "no request runs")
        asyncio.run_coroutine_threadsafe(client.close(), self._loop).result(10)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the gateway ends"


async def _in_background(gateway: Gateway, enough: asyncio.Event) -> None:
    async with gateway.background():
        await enough.wait()


def gateway_over(settings: Settings) -> Gateway:
    """As `stoker serve` makes it for loopback."""
    client = AsyncClient(settings=settings)
    return Gateway(client, access=Keyed(client, required=False))


@contextmanager
def gateway_of(settings: Settings) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a gateway over a broker."""
    served = Served(gateway_over(settings))
    try:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client
    finally:
        served.stop()


async def turns_during(call: Awaitable[T]) -> tuple[T, int]:
    """What `call` returns, and how many turns the event loop has for others meanwhile."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    try:
        return await call, turns
    finally:
        task.cancel()


class Process:
    """`stoker serve`, on a port that is free."""

    def __init__(self, settings: Settings, *options: str) -> None:
        command = [sys.executable, "-m", "stoker.cli", "serve", "--port=0", *options]
        env = {**os.environ, **settings.environment(), "STOKER_URL": settings.address.url}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said.startswith("gateway"), self.stop()
        self.url = self.said.split()[1]

    def stop(self) -> str:
        """End it, and return what it wrote to standard error."""
        self.process.terminate()
        return self.process.communicate(timeout=30)[1]
