"""uvicorn's HTTP protocol, made to send together and at once what it has, with time limits that it does not have: a
client that sends its headers byte by byte, or does not read its answers, would hold its connection for ever."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds from the first moment of a connection, or the first byte of a further request, until its headers are whole.
HEADERS_WITHIN = 10.0
#: Seconds that a client has to take what waits for it before its connection is closed.
TAKEN_WITHIN = 60.0
#: Seconds that a connection which is closed has for what was written before.
FLUSHED_WITHIN = 30.0
#: Bytes that wait for the end of the event loop's turn; more go out at once, so that a slow client is noticed.
MOST_HELD = 32 * 1024


class HoldingTransport:
    """A transport that sends what one turn of the event loop has written by one call of the system: these calls cost
    more than all the rest of a token. Its `close` is the end also for a client that reads nothing."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._bytes += len(data)
        if self._bytes >= MOST_HELD:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._bytes = self._held, [], 0
            self._transport.write(b"".join(held))

    def close(self) -> None:
        self._flush()
        if not self._transport.is_closing():
            self._transport.close()
            self._loop.call_later(FLUSHED_WITHIN, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class TimedProtocol(H11Protocol):
    """It closes a connection whose headers do not come, and one whose answers are not taken."""

    _limit: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # asyncio does this for sockets that name their protocol, and those of a listener that was made before do not. A
        # first token would wait some 40 ms, until the client acknowledges the headers.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(HoldingTransport(transport, self.loop))  # type: ignore[arg-type]
        self._begin()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._begin()
        else:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        # A further request waits here for the client, and ends the limit that connections without one have.
        super().pause_writing()
        self._untaken = self.loop.call_later(TAKEN_WITHIN, self.transport.close)

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def _taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None

    def _begin(self) -> None:
        if self._limit is None:
            self._limit = self.loop.call_later(HEADERS_WITHIN, self.transport.close)

    def _end(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
