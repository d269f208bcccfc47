"""Keys: all under one prefix, ids that Redis refuses twice, and a short list of those that never expire."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest
import redis

from stoker.broker import keys

MAKERS = (keys.job, keys.result, keys.stream, keys.channel, keys.cancel, keys.blob, keys.worker)


def test_every_key_and_channel_starts_with_the_prefix_and_is_its_own() -> None:
    made = [make("x") for make in MAKERS] + [keys.CANCELS, keys.WORKERS, keys.MODELS]
    assert all(key.startswith(keys.PREFIX) for key in made)
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("make", MAKERS)
def test_no_key_of_a_job_or_a_worker_is_durable(make: type) -> None:
    assert not keys.is_durable(make("3f2c"))


@pytest.mark.parametrize(
    "key",
    [
        "stoker:stoker.smollm2-135m-instruct.generate",
        "stoker:policy",
        "stoker:_kombu.binding.celery.pidbox",
        "stoker:_kombu.binding.stoker.x.embed",
        "stoker:unacked",
        "stoker:unacked_index",
        "stoker:unacked_mutex",
    ],
)
def test_queues_and_what_is_not_acknowledged_are_durable(key: str) -> None:
    assert keys.is_durable(key)


@pytest.mark.parametrize(
    "key",
    [
        "stoker.x.generate",
        "other:stoker.x.generate",
        "stoker:stoker.",
        "stoker:unacked_other",
        "stoker:stoker.x.generate\x06\x163",
        "stoker:backlog:stoker.x.generate:3",
        "stoker:workers",
        "stoker:models",
        "stoker:stoker.x.generate\n",
    ],
)
def test_what_only_looks_like_a_queue_is_not(key: str) -> None:
    assert not keys.is_durable(key)


def test_a_queue_carries_one_model_and_one_kind() -> None:
    assert keys.queue("my.model-1", "embed") == "stoker.my.model-1.embed"
    assert keys.is_durable(keys.PREFIX + keys.queue("my.model-1", "embed"))


def test_each_version_of_the_contract_has_queues_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = keys.queue("m", "embed")
    monkeypatch.setattr(keys, "CONTRACT", 2)
    assert keys.queue("m", "embed") == f"{first}.v2"
    assert keys.is_durable(keys.ready(keys.queue("m", "embed")))


def test_redis_itself_refuses_an_entry_twice_and_one_out_of_order() -> None:
    broker: Any = fakeredis.FakeRedis()
    for index in (0, 1, 2):
        broker.xadd(keys.stream("j"), {"entry": str(index)}, id=keys.entry_id(index))
    for index in (0, 2):
        with pytest.raises(redis.ResponseError, match="equal or smaller"):
            broker.xadd(keys.stream("j"), {"entry": "again"}, id=keys.entry_id(index))
    assert [entry[b"entry"] for _, entry in broker.xrange(keys.stream("j"))] == [b"0", b"1", b"2"]
