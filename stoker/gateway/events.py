"""Server-sent events, and the response that carries them for as long as the client stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from stoker.gateway.errors import Refused

#: Seconds of silence after which a comment is sent: proxies between close what is silent for half a minute.
KEEP_ALIVE = 10.0
#: Seconds that a client may take to read what was sent before it counts as gone.
SLOW = 30.0
#: What is sent instead of an event; clients skip it.
COMMENT = b": keep-alive\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Event:
    """`data`: an object, or a text that is sent as it is. `id`: what a client that lost the stream may name."""

    data: dict[str, object] | str
    id: str | None = None
    name: str | None = None

    def encode(self) -> bytes:
        data = self.data if isinstance(self.data, str) else _dump(self.data)
        lines = [
            f"event: {self.name}\n" if self.name else "",
            f"id: {self.id}\n" if self.id else "",
            f"data: {data}\n\n",
        ]
        return "".join(lines).encode()


class Gone(Exception):
    """The client has gone, or reads nothing any more."""


class EventResponse:
    """An ASGI response of events. `left` is awaited when the client goes before the last one.

    It begins with the first event: what is wrong with a request is found before in most cases, and raised as `Refused`
    for a status of its own; what is found later is an event too (`failed`). When the server itself ends, no job is
    cancelled: another gateway goes on with the stream. `in_doubt`: whether the answer may yet be an error with a status
    of its own, so that no comment begins it.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event],
        failed: Callable[[Refused], Iterator[Event]],
        gone: Callable[[], Awaitable[None]],
        left: Callable[[], Awaitable[None]],
        in_doubt: Callable[[], bool] = lambda: False,
    ) -> None:
        self._events, self._failed, self._gone, self._left = events, failed, gone, left
        self._in_doubt = in_doubt
        self._started = False
        #: When something was sent last, by the event loop's clock.
        self._sent = 0.0
        #: Since when a write waits for the client; None: none does.
        self._since: float | None = None
        self._writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `Refused` where nothing was sent yet."""
        try:
            await self._carried(send)
        except Gone:
            await self._left()
            raise Refused(499, "the client has gone.", code="client_gone") from None

    async def _carried(self, send: Send) -> None:
        """Until the last event is sent. One task carries them all: one for each would cost more than all the rest, and
        so would a time limit for each. This one looks how long the client has taken when a limit may be reached."""
        carrier, watch = asyncio.ensure_future(self._carry(send)), asyncio.ensure_future(self._gone())
        self._sent = asyncio.get_running_loop().time()
        try:
            while not carrier.done():
                await _first_of(carrier, watch, self._until_a_limit())
                if watch.done() and not carrier.done():
                    raise Gone
                if not carrier.done():
                    await self._looked_after(send)
            carrier.result()
        finally:
            watch.cancel()
            await _stopped(carrier)

    def _until_a_limit(self) -> float:
        """Seconds until a limit may be reached. A write that waits says more than silence: without a pause between
        two looks, a client that reads nothing would keep the event loop busy."""
        now = asyncio.get_running_loop().time()
        if self._since is None:
            return min(max(0.0, KEEP_ALIVE - (now - self._sent)), SLOW)
        return min(max(0.0, SLOW - (now - self._since)), KEEP_ALIVE)

    async def _looked_after(self, send: Send) -> None:
        """Raise `Gone` where the client takes nothing; say something where nothing was said for long."""
        now = asyncio.get_running_loop().time()
        if self._since is not None:
            if now - self._since >= SLOW:
                raise Gone
        elif now - self._sent >= KEEP_ALIVE and not self._started and self._in_doubt():
            self._sent = now
        elif now - self._sent >= KEEP_ALIVE:
            try:
                async with asyncio.timeout(SLOW):
                    await self._write(send, COMMENT)
            except TimeoutError:
                raise Gone from None

    async def _carry(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._write(send, event.encode())
        except Refused as refused:
            if not self._started:
                raise
            for event in self._failed(refused):
                await self._write(send, event.encode())
        await self._write(send, b"", more=False)

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        time = asyncio.get_running_loop().time
        self._since = time()
        async with self._writing:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sent, self._since = time(), None


async def _first_of(one: asyncio.Future[None], other: asyncio.Future[None], seconds: float) -> None:
    waited: set[asyncio.Future[Any]] = {one, other}
    await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


async def _stopped(task: asyncio.Future[None]) -> None:
    """End `task`, and wait until it has ended, also where this one is cancelled again: its generator can be closed only
    then."""
    cancelled: asyncio.CancelledError | None = None
    task.cancel()
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
