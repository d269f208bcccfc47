"""What the asyncio client does in another way than the blocking one; `blocking.py` has the same names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from stoker.broker.connection import connect_async
from stoker.client.asked import Ask

if TYPE_CHECKING:
    from redis.asyncio import Redis as Redis

    from stoker.client.channels import Channels, Listener
    from stoker.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Texts of a bulk call.
Texts = Iterable[str] | AsyncIterable[str]
#: Requests of a bulk call.
Asks = Iterable[Ask] | AsyncIterable[Ask]
#: Says which model a job of a kind goes to.
Chooser: TypeAlias = Callable[[str | None, str], Awaitable[str]]
#: What a generator meets when its caller leaves it early.
LEFT = (GeneratorExit, asyncio.CancelledError)
#: Seconds that a caller who is cancelled waits for what has to be done yet.
LEAVE_WITHIN = 5.0

sleep = asyncio.sleep
in_thread = asyncio.to_thread


class Connections:
    """The broker, for each event loop that uses the client: a socket serves only the loop that opened it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._of_loop: dict[asyncio.AbstractEventLoop, Redis] = {}
        self._channels: dict[asyncio.AbstractEventLoop, Channels] = {}

    def current(self) -> Redis:
        """The redis-py client of the loop that runs."""
        loop = asyncio.get_running_loop()
        if loop not in self._of_loop:
            self._forget_closed()
            self._of_loop[loop] = connect_async(self._settings)
        return self._of_loop[loop]

    def listener(self) -> Listener:
        """Hears channels of the broker, over the connection that all listeners of the loop share."""
        loop = asyncio.get_running_loop()
        if loop not in self._channels:
            from stoker.client.channels import Channels

            self._channels[loop] = Channels(self.current())
        return self._channels[loop].listener()

    @staticmethod
    def doubt(listener: Listener) -> None:
        """The broker did not answer the reader of `listener`."""
        listener.doubt()

    async def aclose(self) -> None:
        """Close the connections of the loop that runs, and let go of those whose loop has ended."""
        self._forget_closed()
        loop = asyncio.get_running_loop()
        channels, redis = self._channels.pop(loop, None), self._of_loop.pop(loop, None)
        if channels is not None:
            await channels.aclose()
        if redis is not None:
            await redis.aclose()

    def _forget_closed(self) -> None:
        # Other threads, with loops of their own, come and go here meanwhile.
        for loop in list(self._of_loop):
            if loop.is_closed():
                self._of_loop.pop(loop, None)
                self._channels.pop(loop, None)


class Joint(Generic[T]):
    """What several ask at the same time is asked once, and all have its answer or its error."""

    def __init__(self) -> None:
        self._asked: dict[tuple[asyncio.AbstractEventLoop, Hashable], asyncio.Task[T]] = {}

    async def ask(self, what: Hashable, call: Callable[[], Coroutine[object, object, T]]) -> T:
        key = asyncio.get_running_loop(), what
        if key not in self._asked:
            self._asked[key] = key[0].create_task(call())
            self._asked[key].add_done_callback(partial(self._answered, key))
        # One who is cancelled leaves the others their answer.
        return await asyncio.shield(self._asked[key])

    def forget(self) -> None:
        """Who asks from now on asks anew."""
        self._asked.clear()

    def _answered(self, key: tuple[asyncio.AbstractEventLoop, Hashable], task: asyncio.Task[T]) -> None:
        if self._asked.get(key) is task:
            del self._asked[key]


async def finished(call: Callable[[], Awaitable[T]]) -> T:
    """Run `call` to its end, also where the caller is cancelled meanwhile, or was before: as in FastAPI, which ends a
    response by a scope in which every further `await` is cancelled too. It gets `LEAVE_WITHIN` seconds from then on."""
    task = asyncio.ensure_future(call())
    give_up: asyncio.TimerHandle | None = None
    cancelled: asyncio.CancelledError | None = None
    try:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
                give_up = give_up or asyncio.get_running_loop().call_later(LEAVE_WITHIN, task.cancel)
    finally:
        if give_up is not None:
            give_up.cancel()
    if cancelled is None:
        return task.result()
    if task.cancelled() or task.exception() is not None:
        log.warning("while a cancelled caller left a job: %s", "no answer" if task.cancelled() else task.exception())
    raise cancelled


async def each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """The items of either kind of iterable."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
