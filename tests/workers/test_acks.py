"""Acknowledging from many threads at once, through one client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kombu.connection import Connection

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.celery_config import shared_config
from stoker.settings import Settings
from workers.celery import transport

#: What `STOKER_GENERATE_SLOTS` may be, and the loop.
THREADS = 257


@pytest.fixture
def channel(broker: Settings) -> Iterator[Any]:
    transport.install()
    options = shared_config(broker)["broker_transport_options"]
    with Connection(broker.address.celery, transport_options=options) as connection:
        yield connection.channel()


def acknowledge(channel: Any, broker: Settings) -> bool:
    """Whether a message that is held is held no more after its ack."""
    redis = connect(broker)
    redis.hset(keys.UNACKED, "tag", "message")
    channel.qos.ack("tag")
    left = redis.hexists(keys.UNACKED, "tag")
    redis.close()
    return not left


def test_as_many_threads_as_a_lane_may_have_acknowledge_at_once(channel: Any, broker: Settings) -> None:
    taken = [channel.pool.get_connection() for _ in range(THREADS - 1)]
    assert acknowledge(channel, broker)
    for connection in taken:
        channel.pool.release(connection)


def test_acks_share_a_client_until_their_pool_is_another(channel: Any, broker: Settings) -> None:
    assert acknowledge(channel, broker)
    first = channel._create_client()
    assert channel._create_client() is first
    assert channel._create_client(asynchronous=True) is not first, "what waits in a BRPOP cannot acknowledge"
    channel._disconnect_pools()
    assert channel._create_client() is not first
    assert acknowledge(channel, broker)


def test_an_ack_that_comes_after_its_channel_was_closed_arrives(channel: Any, broker: Settings) -> None:
    assert acknowledge(channel, broker)
    channel.close()
    assert acknowledge(channel, broker)
    channel.close()
