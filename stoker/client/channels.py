"""One connection to the broker's channels for all readers of an event loop. The asyncio client has it.

With a connection for each reader, each token of each stream would cost the broker and this process a system call. Here
one task reads for all of them, for as long as there is one: what nobody reads would pile up. It hands each message to
the readers of its channel. A reader whose backlog is full hears no more, and replays the stream from the broker: it
hurts itself alone. Loads redis-py.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from stoker.client.following import Behind, Heard

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Messages that wait for one reader: as many as one replay fetches.
BACKLOG = 512


class FellBehind(RedisConnectionError, Behind):
    """A reader took its messages more slowly than they came. For it, that is a lost connection."""


class Channels:
    """Those of one event loop. New listeners share the connection that the last one had."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._current: SharedConnection | None = None
        self._open: set[SharedConnection] = set()

    def listener(self) -> Listener:
        return Listener(self)

    def connection(self) -> SharedConnection:
        """The one that a listener joins next."""
        if self._current is None or self._current.over:
            self._current = SharedConnection(self._redis)
            self._open.add(self._current)
            self._current.reading.add_done_callback(partial(self._closed, self._current))
        return self._current

    def _closed(self, connection: SharedConnection, _: object) -> None:
        self._open.discard(connection)

    def retire(self, connection: SharedConnection) -> None:
        """Nobody else joins `connection`: it may be dead, and say nothing of it. Those who have it keep it."""
        if self._current is connection:
            self._current = None

    async def aclose(self) -> None:
        for connection in list(self._open):
            await connection.aclose(RedisConnectionError("the client was closed"))


class Listener:
    """What one reader hears; of redis-py's `PubSub`, as much as a reader uses."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._connection: SharedConnection | None = None
        self._waiting: deque[Heard] = deque()
        self._error: Exception | None = None
        self._woken: asyncio.Future[None] | None = None
        #: One timer is moved on from message to message: one for each would cost more than the message.
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self.names: tuple[bytes, ...] = ()

    async def subscribe(self, *channels: str) -> None:
        """Returns when the broker has said that it sends what comes from now on."""
        self.names = tuple(channel.encode() for channel in channels)
        self._connection = self._channels.connection()
        await self._connection.join(self)

    async def get_message(self, timeout: float) -> Heard | None:
        """The next message; None when none comes within `timeout` seconds. Raises what the connection ended with."""
        if not self._waiting and self._error is None and timeout > 0:
            await self._something(timeout)
        if self._waiting:
            return self._waiting.popleft()
        if self._error is not None:
            raise self._error.with_traceback(None)
        return None

    def put(self, message: Heard) -> None:
        if len(self._waiting) < BACKLOG:
            self._waiting.append(message)
            self._wake()
        elif self._connection is not None:
            self._connection.forget(self)
            self.end(FellBehind(f"{BACKLOG} messages wait already"))

    def end(self, error: Exception) -> None:
        """Nothing more comes."""
        self._error = error
        self._wake()

    def doubt(self) -> None:
        """The broker does not answer this reader elsewhere: where the connection has not ended, let it be the last one
        that uses it."""
        if self._connection is not None and self._error is None:
            self._channels.retire(self._connection)

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.leave(self)

    async def _something(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + timeout
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        self._timer = self._timer or loop.call_at(self._due, self._ring)
        self._woken = loop.create_future()
        try:
            await self._woken
        finally:
            self._woken = None

    def _ring(self) -> None:
        fired, self._timer = self._timer, None
        if self._woken is None or fired is None:
            return
        if self._due > fired.when():
            self._timer = asyncio.get_running_loop().call_at(self._due, self._ring)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)


class SharedConnection:
    """One connection, and the task that opens it, reads it and closes it. `over`: nobody may join any more."""

    def __init__(self, redis: Redis) -> None:
        self._pubsub: Any = redis.pubsub(push_handler_func=_as_it_came)
        self._here: set[Listener] = set()
        self._of_channel: dict[bytes, tuple[Listener, ...]] = {}
        self._unsent: list[tuple[str | bytes, ...]] = []
        self._sending: asyncio.Task[None] | None = None
        #: Whose subscriptions the broker has not acknowledged yet, in the order in which they were sent, and how many
        #: channels of each.
        self._asked: deque[tuple[asyncio.Future[None], int]] = deque()
        self._opened = asyncio.Event()
        self._error: Exception | None = None
        # In a context of its own: it serves others than the reader that happened to be the first.
        self.reading = asyncio.get_running_loop().create_task(self._read(), context=Context())
        self.over = False

    async def join(self, listener: Listener) -> None:
        """Raises what the connection ended with."""
        self._here.add(listener)
        for name in listener.names:
            self._of_channel[name] = (*self._of_channel.get(name, ()), listener)
        await self._opened.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append((acknowledged, len(listener.names)))
        self._send("SUBSCRIBE", listener.names)
        try:
            async with asyncio.timeout(self._pubsub.connection.socket_timeout):
                await acknowledged
        except TimeoutError:
            error = RedisTimeoutError("the broker acknowledges no subscription")
            await self.aclose(error)
            raise error from None

    async def leave(self, listener: Listener) -> None:
        """The last one closes the connection."""
        alone = self.forget(listener)
        if not self._here:
            await self.aclose(RedisConnectionError("nobody listens any more"))
        elif alone and self._opened.is_set() and not self.over:
            self._send("UNSUBSCRIBE", alone)

    def forget(self, listener: Listener) -> list[bytes]:
        """Hand `listener` nothing more. Returns its channels that nobody else has."""
        self._here.discard(listener)
        for name in listener.names:
            left = tuple(other for other in self._of_channel.pop(name, ()) if other is not listener)
            if left:
                self._of_channel[name] = left
        return [name for name in listener.names if name not in self._of_channel]

    async def aclose(self, error: Exception) -> None:
        """`error`: what those meet who listen yet."""
        self._end(error)
        self.reading.cancel()
        await asyncio.wait({self.reading})

    async def _read(self) -> None:
        try:
            await self._pubsub.connect()
            self._opened.set()
            read = self._pubsub.connection.read_response
            while True:
                try:
                    self._heard(await read(timeout=math.inf, push_request=True))
                except ResponseError as refused:
                    self._answered(refused)
        except Exception as error:
            self._end(error)
        finally:
            self._end(RedisConnectionError("the connection was closed"))
            if self._sending is not None:
                # Before the connection is another's: redis-py closes it where the one who sends is cancelled.
                self._sending.cancel()
                await asyncio.wait({self._sending})
            await self._pubsub.aclose()

    def _send(self, command: str, names: Sequence[bytes]) -> None:
        """In a task of its own: a reader that is cancelled meanwhile would close the connection for all. What several
        send at once goes out together."""
        self._unsent.append((command, *names))
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send_all(), context=Context())

    async def _send_all(self) -> None:
        connection = self._pubsub.connection
        try:
            while self._unsent:
                commands, self._unsent = self._unsent, []
                await connection.send_packed_command(connection.pack_commands(commands))
        except Exception as error:
            self._end(error)
            self.reading.cancel()
        finally:
            self._sending = None

    def _heard(self, reply: Any) -> None:
        kind, name, data = reply
        if kind == b"message":
            message = Heard(channel=name, data=data)
            for listener in self._of_channel.get(name, ()):
                listener.put(message)
        elif kind == b"subscribe":
            acknowledged, left = self._asked.popleft()
            if left > 1:
                self._asked.appendleft((acknowledged, left - 1))
            elif not acknowledged.done():
                acknowledged.set_result(None)

    def _answered(self, refused: ResponseError) -> None:
        """The broker refuses one subscription, for example by its access rules: the one that was sent first."""
        if not self._asked:
            raise refused
        acknowledged, _ = self._asked.popleft()
        if not acknowledged.done():
            acknowledged.set_exception(refused)

    def _end(self, error: Exception) -> None:
        """Once: what comes later is a consequence."""
        if self.over:
            return
        self.over, self._error = True, error
        self._opened.set()
        for listener in self._here:
            listener.end(error)
        for acknowledged, _ in self._asked:
            if not acknowledged.done():
                acknowledged.set_exception(error)


async def _as_it_came(reply: Any) -> Any:
    """redis-py's own handler makes a line of each message for a log that nobody reads."""
    return reply
