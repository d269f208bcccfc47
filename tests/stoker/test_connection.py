"""What a connection to the broker sends before its first command, and how it reads what older brokers answer."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any

import pytest
import redis as redis_py
import redis.asyncio as redis_asyncio
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from stoker.broker import keys
from stoker.broker.connection import connect, connect_async
from stoker.broker.trouble import passes
from stoker.settings import Settings


async def ping(broker: Settings) -> None:
    client = connect_async(broker)
    try:
        await client.ping()
    finally:
        await client.aclose()


def test_a_new_connection_asks_for_nothing_that_the_broker_refuses(broker: Settings) -> None:
    """Each further question is one more answer that a stream's start waits for."""
    with closing(connect(broker)) as redis:
        redis.config_resetstat()
        with closing(connect(broker)) as other, closing(other.pubsub()) as heard:
            other.ping()
            heard.subscribe("x")
        asyncio.run(ping(broker))
        asked: dict[str, Any] = redis.info("commandstats")
        assert redis.info("errorstats") == {}
        assert set(asked) == {"cmdstat_config|resetstat", "cmdstat_hello", "cmdstat_ping", "cmdstat_subscribe"}


#: As Redis 6.2.14 says it.
IN_SCRIPT = f"Error running script (call to f_{'0' * 40}): @user_script:312: "
OPEN, NOWHERE = keys.open_jobs("stoker.m.generate"), Settings(url="redis://127.0.0.1:1/0")


@pytest.mark.parametrize(
    ("said", "kind", "expected"),
    [
        ("WRONGTYPE Operation against a key", ResponseError, f"WRONGTYPE: the key {OPEN} is a list, not a zset"),
        ("@user_script: 12: -OOM command not allowed", OutOfMemoryError, "OOM command not allowed"),
        ("@user_script: 12: -READONLY You can't write", ReadOnlyError, "READONLY You can't write"),
    ],
)
def test_what_a_command_of_a_script_met_is_read_from_brokers_before_redis_7_too(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[ResponseError], expected: str
) -> None:
    def answer(client: Any, name: str, *arguments: Any) -> bytes:
        if name == "TYPE":
            return b"list"
        raise ResponseError(IN_SCRIPT + said)

    async def answer_later(client: Any, *command: Any) -> bytes:
        return answer(client, *command)

    async def ask_later() -> None:
        client = connect_async(NOWHERE)
        try:
            await client.evalsha("0" * 40, 1, OPEN)
        finally:
            await client.aclose()

    monkeypatch.setattr(redis_py.Redis, "execute_command", answer)
    monkeypatch.setattr(redis_asyncio.Redis, "execute_command", answer_later)
    with closing(connect(NOWHERE)) as redis, pytest.raises(kind) as met:
        redis.evalsha("0" * 40, 1, OPEN)
    assert str(met.value) == expected
    assert passes(met.value) == (kind is not ResponseError)
    with pytest.raises(kind, match=expected):
        asyncio.run(ask_later())


@pytest.mark.parametrize(("patience", "seconds"), [(0.0, 1.0), (1.0, 1.0), (3.5, 3.5), (5.0, 5.0), (60.0, 5.0)])
def test_one_try_takes_no_longer_than_the_patience_and_a_socket_of_this_machine_has_no_connecting(
    patience: float, seconds: float
) -> None:
    for make in (connect, connect_async):
        settings = Settings(url="redis://h:5/2", patience=patience)
        options = make(settings).connection_pool.connection_kwargs
        assert options["socket_timeout"] == options["socket_connect_timeout"] == seconds
        assert options["socket_keepalive"] is True
        local = make(Settings(url="redis+socket:///tmp/x.sock", patience=patience)).connection_pool.connection_kwargs
        assert local["socket_timeout"] == seconds
        assert not {"socket_connect_timeout", "socket_keepalive"} & local.keys()
    given = connect(Settings(url="redis://h:5/2", patience=patience), 0.25).connection_pool.connection_kwargs
    assert (given["socket_timeout"], given["socket_connect_timeout"]) == (0.25, seconds)
