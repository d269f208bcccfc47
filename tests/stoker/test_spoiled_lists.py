"""Lists of jobs, adapters and dead letters in which another program wrote: what is wrong hides nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker import Client
from stoker.broker import keys, ledger, registry
from stoker.broker.ledger.record import Field
from stoker.cli import app
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.contract import ModelCard
from stoker.errors import BrokerUnavailable, InvalidRequest
from stoker.settings import Settings

QUEUE = keys.queue("m", "generate")
CARD = ModelCard(model="m", architecture="a", kinds=("generate", "adapters"), context=1, parameters=1)


@pytest.fixture
def client(broker: Settings) -> Iterator[Client]:
    with Client(settings=broker) as made:
        now = float(made.redis.time()[0])
        made.redis.hset(keys.MODELS, "m/1", CARD.model_copy(update={"seen": now}).model_dump_json())
        for job_id in ("spoiled", "sound"):
            ledger.submit(made.redis, job_id, job_record(generate_request("m", "x", 0, {}), job_id))
        for name in ("spoiled", "sound"):
            registry.register(made.redis, "m", name, 1, {}, promote=True)
        yield made
        made.redis.flushall()


def shown(broker: Settings, *command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--url", broker.url or ""])
    assert result.exit_code == 0, result.output
    return result.output


def test_ids_that_are_none_and_a_record_of_another_type_hide_no_job(client: Client, broker: Settings) -> None:
    redis: Any = client.redis
    redis.zadd(keys.open_jobs(QUEUE), {b"\xff": 1.0, "a\nb": 2.0, "../x": float("inf")})
    redis.delete(keys.job("spoiled"))
    redis.set(keys.job("spoiled"), "of another program")
    assert list(client.jobs()) == list(ledger.open_jobs(redis, [QUEUE])) == ["sound"]


@pytest.mark.parametrize("priority", ["9" * 5000, "\u00b2", "-1", "10", ""])
def test_a_priority_that_is_none_hides_its_own_job_alone(client: Client, priority: str) -> None:
    client.redis.hset(keys.job("spoiled"), Field.PRIORITY, priority)
    assert list(client.jobs()) == ["sound"]


def test_nothing_that_a_list_shows_moves_the_cursor(client: Client, broker: Settings) -> None:
    redis: Any = client.redis
    evil = b"\xff\x1b[31m\n"
    redis.hset(keys.job("spoiled"), mapping={Field.WORKER: evil, Field.CLIENT: evil, Field.MODEL: evil})
    letter = b'{"kind": "generate", "model": "m\\u001b[31m", "request": "", "client": "", "history": []}'
    redis.hset(keys.DEAD, "letter", letter)
    registry.register(redis, "m", "sound", 1, {"method": "\x1b[31m", "time": "x"}, promote=True)
    for command in (("jobs", "list"), ("jobs", "dead"), ("adapters", "list", "--model", "m")):
        assert "\x1b" not in shown(broker, *command)


def test_an_adapters_record_of_another_type_hides_no_other(client: Client) -> None:
    redis: Any = client.redis
    redis.delete(keys.adapter("m", "spoiled"))
    redis.set(keys.adapter("m", "spoiled"), "of another program")
    found = {entry.name: list(entry.versions) for entry in client.adapters.list("m")}
    assert found == {"spoiled": [], "sound": [1]}
    with pytest.raises(BrokerUnavailable, match=keys.adapter("m", "spoiled")):
        client.adapters.get("spoiled", "m")


@pytest.mark.parametrize("time", ["x", 1e300, float("nan"), [], None])
def test_a_time_that_is_none_is_shown_as_unknown(client: Client, broker: Settings, time: object) -> None:
    registry.register(client.redis, "m", "sound", 1, {"time": time}, promote=True)
    assert "sound@1" in shown(broker, "adapters", "list", "--model", "m")


def test_an_id_that_no_broker_could_hold_is_refused_by_name(client: Client) -> None:
    for ask in (client.job, client.retry):
        with pytest.raises(InvalidRequest, match="job_id"):
            ask("\udcff")
