"""Connections to the broker, and the one border where redis-py's errors become ours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from stoker.client_core import broker_unavailable
from stoker.errors import BrokerUnavailable
from stoker.loading import AsyncPatientRetry, PatientRetry
from stoker.settings import Settings

#: The connection is gone or silent: another try may help.
TROUBLE = (RedisConnectionError, RedisTimeoutError)
#: What a broker answers that will take the same command again some time: its memory or its disk is full, or it is a
#: replica in the middle of a fail-over.
_PASSING = (OutOfMemoryError, ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError)
_PASSING_REPLIES = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "LOADING", "BUSY", "NOAUTH", "WRONGPASS", "READONLY", "OOM")

#: Each stream that a client follows has a connection of its own, and redis-py would stop at a hundred.
MAX_CONNECTIONS = 10_000
#: Two more tries within a third of a second, after a lost connection and not after silence.
_RETRIES: Any = (ExponentialBackoff(cap=0.25, base=0.05), 2, (RedisConnectionError,))
#: Seconds. A broker that is stopped (not closed) keeps its sockets open: without a bound a read would hang for ever.
SOCKET_TIMEOUT = 5.0


def connect(settings: Settings, timeout: float | None = None, *, patient: bool = False) -> Any:
    """A thread-safe redis-py client. A connection that turns out to be closed is opened again, so that a broker's
    restart between two calls goes unnoticed; every command of Stoker may be sent twice. `Patience` decides on more.
    `timeout`: seconds that one try may take, else as the settings say. `patient`: whether a command waits for a broker
    that loads its data, as long as the settings' patience lasts.

    Typed `Any` because redis-py types every reply as a union over its decoding modes; ours are always bytes.
    """
    options = _options(settings) if timeout is None else _options(settings) | {"socket_timeout": timeout}
    url = settings.address.redis
    if not patient:
        return redis.Redis.from_url(url, retry=Retry(*_RETRIES), **options)

    def ask() -> Any:
        with redis.Redis.from_url(url, **options) as asking:
            return asking.info("persistence")

    return redis.Redis.from_url(url, retry=PatientRetry(*_RETRIES, patience=settings.patience, ask=ask), **options)


def connect_async(settings: Settings) -> Any:
    """The asyncio twin of `connect`, patient."""
    url, options = settings.address.redis, _options(settings)

    async def ask() -> Any:
        async with redis.asyncio.Redis.from_url(url, **options) as asking:
            return await asking.info("persistence")

    retry = AsyncPatientRetry(*_RETRIES, patience=settings.patience, ask=ask)
    return redis.asyncio.Redis.from_url(url, retry=retry, **options)


def _options(settings: Settings) -> dict[str, Any]:
    # One try takes no longer than the caller's patience with the whole outage.
    timeout = min(SOCKET_TIMEOUT, max(1.0, settings.patience))
    # redis-py would read its own version from disk for each connection, and tell it to the broker: 6 ms of a stream's
    # start (200 streams of one client: 2 s).
    common = {"socket_timeout": timeout, "max_connections": MAX_CONNECTIONS, "driver_info": None}
    if settings.address.redis.startswith("unix://"):
        return common
    return {**common, "socket_connect_timeout": timeout, "socket_keepalive": True}


@contextmanager
def translated(settings: Settings, but: tuple[type[RedisError], ...] = (), at: str = "") -> Iterator[None]:
    """Whatever redis-py raises inside becomes `BrokerUnavailable`, but for what the caller deals with. `at`: what key
    it is about."""
    try:
        yield
    except but:
        raise
    except RedisError as error:
        raise broker_unavailable(settings, error, at) from None


def passes(error: RedisError) -> bool:
    """Whether the trouble may go away by itself, or when somebody mends the broker: the same command will do then."""
    return isinstance(error, TROUBLE + _PASSING) or str(error).startswith(_PASSING_REPLIES)


class Patience:
    """How long a waiting caller bears a broker that does not answer: `settings.patience` seconds an outage."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._since: float | None = None

    def renew(self) -> None:
        """The broker answered."""
        self._since = None

    def spend(self, error: RedisError) -> float:
        """Seconds to wait before the next try; raises `BrokerUnavailable` when there is no point in one."""
        now = time.monotonic()
        self._since = self._since or now
        hopeless = isinstance(error, AuthenticationError | AuthorizationError)
        if hopeless or now - self._since >= self._settings.patience:
            raise self.give_up(error) from None
        return min(1.0, 0.1 + (now - self._since) / 4)

    def give_up(self, error: RedisError) -> BrokerUnavailable:
        return broker_unavailable(self._settings, error)
