"""What the blocking client does in another way than the asyncio one; `asynchronously.py` has the same names."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeAlias, TypeVar

from stoker.broker.connection import connect
from stoker.client.asked import Ask

if TYPE_CHECKING:
    from redis import Redis as Redis
    from redis.client import PubSub as Listener

    from stoker.settings import Settings

T = TypeVar("T")
P = ParamSpec("P")

#: Texts of a bulk call.
Texts = Iterable[str]
#: Requests of a bulk call.
Asks = Iterable[Ask]
#: Says which model a job of a kind goes to.
Chooser: TypeAlias = Callable[[str | None, str], str]
#: What a generator meets when its caller leaves it early.
LEFT = (GeneratorExit, KeyboardInterrupt)

sleep = time.sleep


class Connections:
    """The broker, for every thread."""

    def __init__(self, settings: Settings) -> None:
        self._redis: Redis = connect(settings, patient=True)

    def current(self) -> Redis:
        """The redis-py client."""
        return self._redis

    def listener(self) -> Listener:
        """Hears channels of the broker, over a connection of its own: there is no task that could read for others."""
        listener: Listener = self._redis.pubsub(ignore_subscribe_messages=True)
        return listener

    @staticmethod
    def doubt(listener: Listener) -> None:
        """The broker did not answer the reader of `listener`, whose connection is closed with it."""

    def close(self) -> None:
        self._redis.close()


class Joint(Generic[T]):
    """A thread that asks waits for its own answer."""

    def ask(self, what: Hashable, call: Callable[[], T]) -> T:
        return call()

    def forget(self) -> None:
        """Each asks anew in any case."""


def in_thread(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """A blocking caller waits in its own thread."""
    return call(*arguments, **named)


def finished(call: Callable[[], T]) -> T:
    """Run `call`: nothing cancels a blocking caller."""
    return call()


def each(items: Iterable[T]) -> Iterator[T]:
    yield from items
