"""Who is the broker's primary: asked of each sentinel in turn, the one that answered last first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.sentinel import MasterNotFoundError, SentinelConnectionPool

from stoker.address import Address
from stoker.broker import sentinel

UP = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 0, "ip": "10.0.0.1", "port": 7}
URL = "redis+sentinel://me:secret@a:1,b:2,c:3/queue/4?sentinel_username=s&sentinel_password=p"
#: What a sentinel answers: what it knows of its services, or why it does not answer.
Answer = dict[str, Any] | Exception
Discover = Callable[[list[Answer]], tuple[list[Any], list[int], list[int]]]


class Sentinel:
    def __init__(self, place: int, answer: Answer, asked: list[int]) -> None:
        self.place, self._answer, self._asked = place, answer, asked
        self.connection_pool = SimpleNamespace(connection_kwargs={"host": "abc"[place], "port": place + 1})

    def answer(self) -> dict[str, Any]:
        self._asked.append(self.place)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def sentinel_masters(self) -> dict[str, Any]:
        return self.answer()


class AsyncSentinel(Sentinel):
    async def sentinel_masters(self) -> dict[str, Any]:  # type: ignore[override]
        return self.answer()


def blocking(answers: list[Answer]) -> tuple[list[Any], list[int], list[int]]:
    """Ask twice: what was found, who was asked, and in which order they are asked next."""
    address, asked = Address.parse(URL), list[int]()
    assert address.sentinels is not None
    client = sentinel.blocking(address, address.sentinels, {})
    manager = client.connection_pool.sentinel_manager
    manager.sentinels = [Sentinel(place, answer, asked) for place, answer in enumerate(answers)]
    found = [manager.discover_master("queue") for _ in range(2)]
    return found, asked, [each.place for each in manager.sentinels]


def asynchronous(answers: list[Answer]) -> tuple[list[Any], list[int], list[int]]:
    address, asked = Address.parse(URL), list[int]()
    assert address.sentinels is not None
    client = sentinel.asynchronous(address, address.sentinels, {})
    manager = client.connection_pool.sentinel_manager
    manager.sentinels = [AsyncSentinel(place, answer, asked) for place, answer in enumerate(answers)]

    async def ask() -> list[Any]:
        return [await manager.discover_master("queue") for _ in range(2)]

    return asyncio.run(ask()), asked, [each.place for each in manager.sentinels]


@pytest.mark.parametrize("discover", [blocking, asynchronous])
def test_the_sentinel_that_answered_is_asked_first_from_then_on_and_all_are_kept(discover: Discover) -> None:
    found, asked, order = discover([RedisConnectionError("refused"), RedisTimeoutError("silent"), {"queue": UP}])
    assert found == [("10.0.0.1", 7)] * 2
    assert asked == [0, 1, 2, 2]
    assert order == [2, 0, 1]


@pytest.mark.parametrize("discover", [blocking, asynchronous])
@pytest.mark.parametrize("state", [{"is_sdown": True}, {"is_odown": True}, {"is_master": False}])
def test_a_primary_that_a_sentinel_takes_for_dead_is_none(discover: Discover, state: dict[str, Any]) -> None:
    found, asked, _ = discover([{"queue": UP | state}, {"other": UP}, {"queue": UP | {"port": 8}}])
    assert found == [("10.0.0.1", 8)] * 2
    assert asked == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("discover", "error"), [(blocking, MasterNotFoundError), (asynchronous, AsyncMasterNotFoundError)]
)
def test_where_none_knows_a_primary_each_says_why(discover: Discover, error: type[Exception]) -> None:
    with pytest.raises(error) as refusal:
        discover([RedisConnectionError("refused."), {}, {"queue": UP | {"is_sdown": True}}])
    assert str(refusal.value) == (
        "no sentinel names a primary of 'queue': refused; that at b:2 knows none that is up; "
        "that at c:3 knows none that is up"
    )


@pytest.mark.parametrize("make", [sentinel.blocking, sentinel.asynchronous])
def test_the_broker_and_its_sentinels_each_have_their_own_login(make: Any) -> None:
    address = Address.parse(URL)
    assert address.sentinels is not None
    pool = make(address, address.sentinels, {"max_connections": 5}).connection_pool
    own = {name: pool.connection_kwargs.get(name) for name in ("username", "password", "db")}
    assert own == {"username": "me", "password": "secret", "db": 4}
    assert pool.service_name == "queue"
    for place, each in enumerate(pool.sentinel_manager.sentinels):
        asked = each.connection_pool.connection_kwargs
        assert (asked["host"], asked["port"]) == ("abc"[place], place + 1)
        assert (asked["username"], asked["password"]) == ("s", "p")
        assert asked["socket_timeout"] == asked["socket_connect_timeout"] == sentinel.SENTINEL_TIMEOUT


def test_connections_to_the_sentinels_are_closed_with_those_to_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    address, closed, broker = Address.parse(URL), list[str](), list[bool]()
    #: Those of this test: others may be closed meanwhile, as they are collected.
    own = list[Any]()

    def disconnect(pool: Any, inuse_connections: bool = True) -> None:
        if any(pool is each for each in own):
            broker.append(inuse_connections)

    async def disconnect_async(pool: Any, inuse_connections: bool = True) -> None:
        disconnect(pool, inuse_connections)

    monkeypatch.setattr(SentinelConnectionPool, "disconnect", disconnect)
    monkeypatch.setattr(AsyncSentinelConnectionPool, "disconnect", disconnect_async)
    assert address.sentinels is not None
    pool = sentinel.blocking(address, address.sentinels, {}).connection_pool
    own.append(pool)
    pool.sentinel_manager.close = lambda: closed.append("blocking")
    pool.disconnect(inuse_connections=False)
    assert closed == [], "those that are in use may need them yet"
    pool.disconnect()

    async def leave() -> None:
        assert address.sentinels is not None
        opened = sentinel.asynchronous(address, address.sentinels, {}).connection_pool

        own.append(opened)

        async def aclose() -> None:
            closed.append("asynchronous")

        opened.sentinel_manager.aclose = aclose
        await opened.disconnect(inuse_connections=False)
        assert closed == ["blocking"]
        await opened.disconnect()

    asyncio.run(leave())
    assert closed == ["blocking", "asynchronous"]
    assert broker == [False, True] * 2
