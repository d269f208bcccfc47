"""kombu's table of the messages that a worker holds, overwritten by another program: deliveries and acks go on."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ResponseError

from stoker.broker import keys
from tests.workers.test_clock import deliver, health, qos
from workers.services.mending import Mender

__all__ = ["health", "qos"]


def spoil(redis: Any, key: str) -> None:
    redis.delete(key)
    redis.set(key, "of another program", ex=60)


@pytest.mark.parametrize("key", [keys.UNACKED, keys.LEASES])
def test_a_message_is_held_though_another_program_wrote_over_the_table(redis: Any, qos: Any, key: str) -> None:
    qos.channel.deliveries.mend = Mender(redis, list, "w").round
    spoil(redis, key)
    deliver(qos)
    assert redis.hkeys(keys.UNACKED) == [b"job#1"]
    assert redis.zrange(keys.LEASES, 0, -1) == [b"job#1"]
    assert redis.get(keys.spoiled(key)) == b"of another program"


@pytest.mark.parametrize("key", [keys.UNACKED, keys.LEASES])
def test_a_message_is_acknowledged_though_another_program_wrote_over_the_table(redis: Any, qos: Any, key: str) -> None:
    qos.channel.deliveries.mend = Mender(redis, list, "w").round
    deliver(qos)
    spoil(redis, key)
    qos.ack("job#1")
    assert not redis.hkeys(keys.UNACKED)
    assert not redis.zrange(keys.LEASES, 0, -1)


def test_what_cannot_be_mended_is_raised(redis: Any, qos: Any) -> None:
    spoil(redis, keys.UNACKED)
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        deliver(qos)
