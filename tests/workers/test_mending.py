"""Keys that jobs share and that hold another type: moved aside, once, and never a right one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.settings import Settings
from workers.services.mending import SHARED, Mender, keys_of

QUEUE = keys.queue("m", "generate")
RIGHT = SHARED | keys_of(QUEUE)


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    client = connect(broker)
    yield client
    client.close()


def fill(redis: Any, key: str, kind: str) -> None:
    {
        "string": lambda: redis.set(key, "x"),
        "hash": lambda: redis.hset(key, "a", "b"),
        "list": lambda: redis.lpush(key, "x"),
        "set": lambda: redis.sadd(key, "x"),
        "zset": lambda: redis.zadd(key, {"x": 1.0}),
    }[kind]()
    redis.expire(key, 60)


@pytest.mark.parametrize("key", RIGHT)
def test_what_spoils_a_key_that_jobs_share_is_moved_aside_and_kept_for_a_while(redis: Any, key: str) -> None:
    redis.set(key, "x")
    mender = Mender(redis, lambda: [QUEUE])
    assert mender.round()
    assert not redis.exists(key)
    assert redis.get(keys.spoiled(key)) == b"x"
    assert 0 < redis.ttl(keys.spoiled(key)) <= keys.DEAD_TTL
    assert not mender.round()


def test_right_keys_and_keys_of_others_stay_as_they_are(redis: Any) -> None:
    for key, kind in RIGHT.items():
        fill(redis, key, kind)
    other = keys.ready(keys.queue("other", "embed"))
    fill(redis, other, "string")
    before = set(redis.keys())
    assert not Mender(redis, lambda: [QUEUE]).round()
    assert set(redis.keys()) == before
    redis.delete(other)


def test_a_key_that_is_right_again_in_between_is_not_moved(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers see it wrong; the second comes when it was moved and written anew."""
    mender = Mender(redis, list)
    move = mender.move

    def late(key: str, found: str, kind: str) -> bool:
        redis.delete(key)
        fill(redis, key, kind)
        return move(key, found, kind)

    monkeypatch.setattr(mender, "move", late)
    fill(redis, keys.WORKERS, "string")
    assert not mender.round()
    assert redis.type(keys.WORKERS) == b"zset"


def test_every_key_that_is_mended_is_declared(redis: Any) -> None:
    assert all(keys.kind_of(key) for key in RIGHT)
    assert all(keys.kind_of(keys.spoiled(key)) for key in RIGHT)


def test_all_that_is_wrong_is_moved_at_once(redis: Any) -> None:
    for key in (keys.WORKERS, keys.MODELS, keys.ready(QUEUE)):
        redis.set(key, "x")
    assert Mender(redis, lambda: [QUEUE]).round()
    assert not redis.exists(keys.WORKERS, keys.MODELS, keys.ready(QUEUE))


def test_the_list_of_adapters_of_a_served_model_is_mended_too(redis: Any) -> None:
    redis.set(keys.adapters("m"), "of another program", ex=60)
    assert Mender(redis, lambda: [QUEUE]).round()
    assert redis.sadd(keys.adapters("m"), "style") == 1
    redis.delete(keys.adapters("m"))


@pytest.mark.parametrize("queue", ["stoker.m.generate", "stoker.m.embed.v2", "stoker.qwen2.5-0.5b.train"])
def test_a_queue_says_its_model(queue: str) -> None:
    assert keys.model_of(queue) in ("m", "qwen2.5-0.5b")
