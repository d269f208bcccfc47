"""Connections that ask Redis' sentinels where the broker is, each time that they are opened. Loads redis-py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from stoker.address import Address, Sentinels
from stoker.broker.trouble import TROUBLE
from stoker.broker.wrong_types import AsyncRedis, Redis

#: Seconds that one sentinel is asked: one whose machine is off must not hold up the question to the next.
SENTINEL_TIMEOUT = 1.0


def login(sentinels: Sentinels) -> dict[str, Any]:
    """How a sentinel is asked, for redis-py's and kombu's connections to it."""
    return {
        "username": sentinels.username,
        "password": sentinels.password,
        "socket_timeout": SENTINEL_TIMEOUT,
        "socket_connect_timeout": SENTINEL_TIMEOUT,
        # There are others to ask.
        "retry": Retry(NoBackoff(), 0),
    }


class _Asking(Sentinel):
    """As redis-py's, except that it says in plain words why there is no primary."""

    def discover_master(self, service_name: str) -> Any:
        reasons = []
        for sentinel in self.sentinels:
            try:
                masters: Any = sentinel.sentinel_masters()
            except TROUBLE as error:
                reasons.append(str(error))
                continue
            state = masters.get(service_name)
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]
                # It answers: the next question goes to it first.
                self.sentinels = [sentinel, *(other for other in self.sentinels if other is not sentinel)]
                return state["ip"], state["port"]
            reasons.append(_knows_none(sentinel))
        raise MasterNotFoundError(_unknown(service_name, reasons))


class _AsyncAsking(AsyncSentinel):
    async def discover_master(self, service_name: str) -> Any:
        reasons = []
        for sentinel in self.sentinels:
            try:
                masters: Any = await sentinel.sentinel_masters()
            except TROUBLE as error:
                reasons.append(str(error))
                continue
            state = masters.get(service_name)
            if state and self.check_master_state(state, service_name):
                self.sentinels = [sentinel, *(other for other in self.sentinels if other is not sentinel)]
                return state["ip"], state["port"]
            reasons.append(_knows_none(sentinel))
        raise AsyncMasterNotFoundError(_unknown(service_name, reasons))


def _knows_none(sentinel: Any) -> str:
    where = sentinel.connection_pool.connection_kwargs
    return f"that at {where['host']}:{where['port']} knows none that is up"


def _unknown(service: str, reasons: list[str]) -> str:
    return f"no sentinel names a primary of {service!r}: {'; '.join(reason.rstrip('.') for reason in reasons)}"


class Pool(SentinelConnectionPool):
    """As redis-py's, except that its connections to the sentinels are closed with it."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:
            self.sentinel_manager.close()


class AsyncPool(AsyncSentinelConnectionPool):
    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            await self.sentinel_manager.aclose()


def blocking(address: Address, sentinels: Sentinels, options: Mapping[str, Any]) -> Any:
    """As `Redis.from_url`."""
    manager = _Asking(sentinels.hosts, sentinel_kwargs=login(sentinels))  # type: ignore[no-untyped-call]
    pool = Pool(sentinels.service, manager, **_connection(address), **options)  # type: ignore[no-untyped-call]
    return Redis.from_pool(pool)


def asynchronous(address: Address, sentinels: Sentinels, options: Mapping[str, Any]) -> Any:
    """As `AsyncRedis.from_url`."""
    manager = _AsyncAsking(sentinels.hosts, sentinel_kwargs=login(sentinels))  # type: ignore[no-untyped-call]
    pool = AsyncPool(sentinels.service, manager, **_connection(address), **options)  # type: ignore[no-untyped-call]
    return AsyncRedis.from_pool(pool)


def _connection(address: Address) -> dict[str, Any]:
    """The broker's login and database."""
    options = parse_url(address.redis)
    return {name: value for name, value in options.items() if name in ("username", "password", "db")}
