"""What a job's error says when the broker refused a command: which key it was, and what to do about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from stoker.broker import keys
from workers.blame import blame

QUEUE = keys.queue("m", "generate")
#: As a pipeline's come: they do not say which key it was.
REFUSED = ResponseError("Command # 2 of pipeline caused error: WRONGTYPE Operation against a key")


@pytest.mark.parametrize(
    ("key", "right"),
    [
        (keys.job("job"), "hash"),
        (keys.stream("job"), "stream"),
        (keys.dispatched(QUEUE), "zset"),
        (keys.backlog(QUEUE, 9), "zset"),
        (keys.POLICY, "hash"),
    ],
)
def test_a_wrong_type_is_named_with_its_key_and_what_to_do(redis: Any, key: str, right: str) -> None:
    redis.rpush(key, "x")
    redis.expire(key, 60)
    said = blame(redis, "job", QUEUE, REFUSED)
    redis.delete(key)
    assert said.startswith(f"the broker refused it ({REFUSED}): the key {key} is a list, not a {right}. ")
    assert said.endswith("Something else than Stoker wrote there: delete it, and send the job again")


def test_all_keys_of_wrong_types_are_named_and_no_others(redis: Any) -> None:
    redis.set(keys.result("job"), "right", ex=60)
    for key in (keys.job("job"), keys.stream("job")):
        redis.set(key, "wrong", ex=60)
    said = blame(redis, "job", QUEUE, REFUSED)
    assert said.count("the key ") == 2
    assert f"the key {keys.job('job')} is a string, not a hash; the key {keys.stream('job')} is a string" in said


def test_another_refusal_is_said_as_it_is_though_a_type_is_wrong_too(redis: Any) -> None:
    redis.set(keys.job("job"), "wrong", ex=60)
    assert blame(redis, "job", QUEUE, ResponseError("OOM no")) == "the broker refused it (OOM no)"


def test_what_cannot_be_looked_up_is_said_without_the_key() -> None:
    def away() -> None:
        raise RedisConnectionError("away")

    pipeline = SimpleNamespace(type=lambda key: None, execute=away)
    broker = SimpleNamespace(pipeline=lambda **_: pipeline)
    assert blame(broker, "job", QUEUE, REFUSED) == f"the broker refused it ({REFUSED})"
