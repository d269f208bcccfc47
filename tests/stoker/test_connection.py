"""What a connection to the broker sends before its first command."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any

from stoker.broker.connection import connect, connect_async
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
