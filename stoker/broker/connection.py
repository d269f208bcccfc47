"""Connections to the broker, and the one border where redis-py's errors become ours."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stoker.broker.functions import Functions
from stoker.errors import ConfigError

if TYPE_CHECKING:
    from redis.exceptions import RedisError

    from stoker.address import Address
    from stoker.broker.trouble import TROUBLE as TROUBLE
    from stoker.broker.trouble import passes as passes
    from stoker.settings import Settings

#: Each stream that a client follows has a connection of its own, and redis-py would stop at a hundred.
MAX_CONNECTIONS = 10_000
#: Seconds. A broker that is stopped (not closed) keeps its sockets open: without a bound a read would hang for ever.
SOCKET_TIMEOUT = 5.0


def __getattr__(name: str) -> Any:
    """`TROUBLE` and `passes`, when they are first used: a program that imports the client may open no connection for
    a long time, or never, and redis-py takes longer to load than all of the client."""
    if name not in ("TROUBLE", "passes"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("stoker.broker.trouble"), name)
    return value


def connect(
    settings: Settings, timeout: float | None = None, *, patient: bool = False, loads_functions: bool = False
) -> Any:
    """A thread-safe redis-py client. A connection that turns out to be closed is opened again, so that a broker's
    restart between two calls goes unnoticed; every command of Stoker may be sent twice. `Patience` decides on more.
    `timeout`: seconds that one try may take, else as the settings say. `patient`: whether a command waits for a broker
    that loads its data, as long as the settings' patience lasts. `loads_functions`: whether it loads the
    ledger's functions where they are missing.

    Typed `Any` because redis-py types every reply as a union over its decoding modes; ours are always bytes.
    """
    from redis.retry import Retry

    from stoker.broker.loading import PatientRetry

    options = _options(settings) if timeout is None else _options(settings) | {"socket_timeout": timeout}
    address = settings.address
    if not patient:
        return _with_functions(_opened(address, {"retry": Retry(*retries()), **options}), loads=loads_functions)

    def ask() -> Any:
        with _opened(address, options) as asking:
            return asking.info("persistence")

    retry = PatientRetry(*retries(), patience=settings.patience, ask=ask)
    return _with_functions(_opened(address, {"retry": retry, **options}), loads=loads_functions)


def connect_async(settings: Settings) -> Any:
    """The asyncio twin of `connect`, patient."""
    from stoker.broker.loading import AsyncPatientRetry

    address, options = settings.address, _options(settings)

    async def ask() -> Any:
        async with _opened_async(address, options) as asking:
            return await asking.info("persistence")

    retry = AsyncPatientRetry(*retries(), patience=settings.patience, ask=ask)
    return _with_functions(_opened_async(address, {"retry": retry, **options}), loads=False)


def _with_functions(client: Any, *, loads: bool) -> Any:
    client.functions = Functions(loads=loads)
    return client


def _opened(address: Address, options: dict[str, Any]) -> Any:
    from stoker.broker.wrong_types import Redis

    _check_files(address)
    if address.sentinels is None:
        return Redis.from_url(address.redis, **options)
    from stoker.broker import sentinel

    return sentinel.blocking(address, address.sentinels, options)


def _opened_async(address: Address, options: dict[str, Any]) -> Any:
    from stoker.broker.wrong_types import AsyncRedis

    _check_files(address)
    if address.sentinels is None:
        return AsyncRedis.from_url(address.redis, **options)
    from stoker.broker import sentinel

    return sentinel.asynchronous(address, address.sentinels, options)


def _check_files(address: Address) -> None:
    for option, file in address.files:
        if not os.access(file, os.R_OK):
            raise ConfigError(f"the broker's URL: {option}={file} cannot be read; it names a file of this machine.")


def retries() -> Any:
    """Two more tries within a third of a second, after a lost connection and not after silence."""
    from redis.backoff import ExponentialBackoff
    from redis.exceptions import ConnectionError

    return ExponentialBackoff(cap=0.25, base=0.05), 2, (ConnectionError,)


def _options(settings: Settings) -> dict[str, Any]:
    from redis.maint_notifications import MaintNotificationsConfig

    # One try takes no longer than the caller's patience with the whole outage.
    timeout = min(SOCKET_TIMEOUT, max(1.0, settings.patience))
    # redis-py would read its own version from disk for each connection, and send it to the broker: 6 ms of a stream's
    # start (200 streams of one client: 2 s).
    common: dict[str, Any] = {"socket_timeout": timeout, "max_connections": MAX_CONNECTIONS, "driver_info": None}
    # redis-py would ask for notices that Redis Enterprise alone sends: one more answer to wait for.
    common["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
    if settings.address.redis.startswith("unix://"):
        return common
    return {**common, "socket_connect_timeout": timeout, "socket_keepalive": True}


@contextmanager
def translated(settings: Settings, passing: tuple[type[RedisError], ...] = (), at: str = "") -> Iterator[None]:
    """What redis-py raises inside becomes `BrokerUnavailable`. `passing`: errors that the caller handles, and gets
    unchanged. `at`: the key that is asked for."""
    try:
        yield
    except passing:
        raise
    except Exception as error:
        from redis.exceptions import RedisError

        from stoker.broker.trouble import broker_unavailable

        if not isinstance(error, RedisError):
            raise
        raise broker_unavailable(settings, error, at) from None


class Patience:
    """How long a waiting caller bears a broker that does not answer: `settings.patience` seconds an outage."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._since: float | None = None

    def renew(self) -> None:
        """The broker answered."""
        self._since = None

    def spend(self, error: Exception) -> float:
        """Seconds to wait before the next try; raises `BrokerUnavailable` when there is no point in one."""
        from stoker.broker.trouble import broker_unavailable, hopeless

        now = time.monotonic()
        self._since = self._since or now
        if hopeless(error) or now - self._since >= self._settings.patience:
            raise broker_unavailable(self._settings, error) from None
        return min(1.0, 0.1 + (now - self._since) / 4)
