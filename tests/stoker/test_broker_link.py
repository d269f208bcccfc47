"""What the client asks of a broker, and what it leaves there: on a real one, with the records that a worker writes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker import AsyncClient, Client
from stoker.broker import keys, registry
from stoker.broker.ledger.record import Field
from stoker.broker.loading import AsyncPatientRetry, PatientRetry
from stoker.client import following
from stoker.client._async import broker_link
from stoker.client._async.broker_link import AsyncBrokerLink
from stoker.client._sync import broker_link as blocking_link
from stoker.client._sync.adapters import Adapters
from stoker.client.asynchronously import Connections
from stoker.client.commands import Waiting
from stoker.contract import Presence, StreamToken
from stoker.contract.control import ModelReport
from stoker.errors import (
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobLost,
    JobTimeout,
    UnknownAdapter,
    WorkerUnavailable,
)
from stoker.settings import Settings
from tests.stoker.lost_answers import one_lost_answer
from tests.stoker.test_client_core import card, fake, server

__all__ = ["fake", "server"]

TOKEN = StreamToken(index=0, token_id=1, text="x", logit=0.0, logprob=-1.0, probability=1.0)


@pytest.fixture
def adapters(server: Any) -> Iterator[Adapters]:
    """Of a client, where a model that takes adapters was served lately."""
    able = card("able", "generate", "adapters")
    server.hset(keys.MODELS, able.model, able.model_dump_json())
    server.expire(keys.MODELS, keys.MODEL_TTL)
    with Client() as client:
        yield client.adapters


def failed(server: Any, job_id: str) -> None:
    """As a worker ends a job that failed, after its first token."""
    server.xadd(keys.stream(job_id), {"entry": TOKEN.model_dump_json()}, id=keys.entry_id(0))
    server.expire(keys.stream(job_id), 60)
    report = {"exc_type": "JobFailed", "exc_message": ["the model fell over"]}
    server.set(keys.result(job_id), json.dumps({"status": "FAILURE", "result": report}), ex=60)


def test_a_stream_of_a_job_that_failed_ends_with_its_error(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        job = client.generate("x", model="smol")
        failed(server, job.id)
        stream = job.stream()
        assert next(stream) == TOKEN
        with pytest.raises(JobFailed, match="the model fell over"):
            next(stream)


def test_a_reader_that_has_what_it_wants_listens_no_more(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        job = client.generate("x", model="smol")
        job.cancel()
        with pytest.raises(JobCancelled):
            job.result(timeout=30)
        assert server.pubsub_channels() == []


def test_the_result_of_a_stream_that_has_ended_is_fetched_without_listening(
    fake: Callable[[], Client], server: Any
) -> None:
    def subscriptions() -> int:
        return int(server.info("commandstats").get("cmdstat_subscribe", {"calls": 0})["calls"])

    with fake() as client:
        job = client.generate("x", model="smol")
        failed(server, job.id)
        with pytest.raises(JobFailed):
            list(job.stream())
        before = subscriptions()
        with pytest.raises(JobFailed, match="the model fell over"):
            job.result()
        assert subscriptions() == before
        server.delete(keys.job(job.id), keys.result(job.id))
        with pytest.raises(JobLost):
            job.result(timeout=30)


def test_a_job_that_the_broker_does_not_know_cannot_be_cancelled(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        job = client.embed(["a"], model="mini")
        server.delete(keys.job(job.id))
        with pytest.raises(JobLost, match=job.id):
            job.cancel()


def test_vectors_that_are_discarded_are_gone_from_the_broker(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        job, other = client.embed(["a"], model="mini"), client.embed(["b"], model="mini")
        for each in (job, other):
            server.set(keys.blob(keys.vectors(each.id)), b"vectors", ex=60)
        job.discard()
        assert not server.exists(keys.blob(keys.vectors(job.id)))
        assert server.exists(keys.blob(keys.vectors(other.id)))


def test_open_jobs_of_every_kind_of_a_model_are_listed(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        sent = [client.generate("x", model="smol").id, client.train("style", "worker:rows.jsonl", model="smol").id]
        assert [(job_id, job["kind"]) for job_id, job in client.jobs().items()] == [
            (sent[0], "generate"),
            (sent[1], "train"),
        ]


def test_what_another_program_wrote_over_one_job_or_adapter_hides_no_other(
    fake: Callable[[], Client], adapters: Adapters, server: Any
) -> None:
    for name in ("good", "spoiled"):
        registry.register(server, "able", name, 1, {"rank": 8}, promote=True)
    server.set(keys.adapter("able", "spoiled"), "x", ex=60)
    assert "good" in [entry.name for entry in adapters.list("able")]
    with fake() as client:
        jobs = [client.generate("x", model="smol") for _ in range(3)]
        server.set(keys.job(jobs[1].id), "x", ex=60)
        assert {jobs[0].id, jobs[2].id} <= set(client.jobs())


def test_a_priority_travels_with_its_job(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        for priority in (0, 7):
            job = client.embed(["a"], model="mini", priority=priority)
            assert server.hget(keys.job(job.id), Field.PRIORITY) == str(priority).encode()
            assert client.jobs()[job.id]["priority"] == priority


def test_a_dataset_that_the_worker_has_is_no_input_in_the_broker(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        there = client.train("style", "worker:rows.jsonl", model="smol")
        sent = client.train("style", [{"text": "x"}], model="smol")
    assert not server.hexists(keys.job(there.id), Field.BLOB)
    assert server.keys(keys.blob("*")) == [server.hget(keys.job(sent.id), Field.BLOB)]


def test_a_version_has_to_be_named_to_be_promoted_or_unloaded_and_none_to_be_rolled_back(
    adapters: Adapters, server: Any
) -> None:
    for version in (1, 2):
        registry.register(server, "able", "style", version, {"rank": 8}, promote=True)
    for change, adapter in (
        (adapters.promote, "style"),
        (adapters.unload, "style"),
        (adapters.rollback, "style@1"),
        (adapters.deactivate, "style@1"),
    ):
        with pytest.raises(InvalidRequest, match="style"):
            change(adapter, "able")
    entry = adapters.get("style", "able")
    assert (entry.serving, list(entry.versions)) == (2, [1, 2])


def test_an_adapter_whose_last_version_was_unloaded_is_returned_without_versions_and_then_unknown(
    adapters: Adapters, server: Any
) -> None:
    registry.register(server, "able", "style", 1, {"rank": 8}, promote=False)
    entry = adapters.unload("style@1", "able")
    assert (entry.name, entry.serving, dict(entry.versions)) == ("style", None, {})
    with pytest.raises(UnknownAdapter):
        adapters.get("style", "able")


def there(server: Any) -> Presence:
    """A worker that is alive, and takes no command."""
    presence = Presence(
        worker="w@h/1", host="h", pid=1, device="cpu", started=0.0, time=time.time(), models=(), adapters={}, lanes={},
        memory_bytes=0,
    )  # fmt: skip
    server.zadd(keys.WORKERS, {presence.worker: time.time()})
    server.expire(keys.WORKERS, 60)
    server.set(keys.worker(presence.worker), presence.model_dump_json(), ex=keys.PRESENCE_TTL)
    return presence


def test_a_command_that_no_worker_takes_expires(fake: Callable[[], Client], server: Any) -> None:
    presence = there(server)
    server.lpush(keys.commands(presence.worker), "of another client")
    with fake() as client, pytest.raises(JobTimeout):
        client.models.load("m=/m", worker=presence.worker, timeout=0)
    assert server.lrange(keys.commands(presence.worker), 0, -1) == [b"of another client"], "its own is taken back"
    assert 0 < server.ttl(keys.commands(presence.worker)) <= keys.COMMAND_TTL


def test_a_command_whose_sending_got_no_answer_is_taken_back_whole(fake: Callable[[], Client], server: Any) -> None:
    worker = there(server).worker
    with fake() as client, one_lost_answer(b"LPUSH"), pytest.raises(JobTimeout, match="nothing was done"):
        client.models.load("m=/m", worker=worker, timeout=0)
    assert not server.exists(keys.commands(worker))


def test_a_command_that_has_begun_goes_on_though_it_was_sent_twice(
    fake: Callable[[], Client], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = there(server).worker

    def begins(waiting: Waiting) -> None:
        asked = json.loads(server.rpop(keys.commands(worker)))
        report = ModelReport(id=asked["id"], worker=worker, verb="load", model="m", phase="begun")
        server.set(keys.command(report.id), report.model_dump_json(), ex=60)

    monkeypatch.setattr(Waiting, "pause", begins)
    with fake() as client, one_lost_answer(b"LPUSH"), pytest.raises(JobTimeout, match="it goes on"):
        client.models.load("m=/m", worker=worker, timeout=0)


def test_commands_are_queued_in_order_and_end_when_their_worker_goes_though_others_wait(
    fake: Callable[[], Client], server: Any
) -> None:
    name = there(server).worker
    with fake() as client:
        settings = client.settings

    async def ask() -> tuple[list[str], list[Any]]:
        async with AsyncClient(settings=settings) as client:
            loads = []
            for model in ("a=/a", "b=/b", "c=/c"):
                loads.append(asyncio.ensure_future(client.models.load(model, worker=name, timeout=20)))
                while server.llen(keys.commands(name)) < len(loads):
                    await asyncio.sleep(0)
            # As a worker takes them.
            taken = [json.loads(server.brpop([keys.commands(name)])[1])["model"] for _ in range(2)]
            server.delete(keys.worker(name))
            return taken, await asyncio.gather(*loads, return_exceptions=True)

    taken, ends = asyncio.run(ask())
    assert [model[0] for model in taken] == ["a", "b"]
    assert [type(end) for end in ends] == [WorkerUnavailable] * 3


def test_a_rollback_whose_answer_is_lost_goes_back_one_version(adapters: Adapters, server: Any) -> None:
    for version in (1, 2, 3):
        registry.register(server, "able", "style", version, {"rank": 8}, promote=True)
    with one_lost_answer(b"rollback\r\n"):
        assert adapters.rollback("style", "able").serving == 2
    adapters.deactivate("style", "able")
    assert adapters.rollback("style", "able").serving == 2, "none served"


def test_a_version_that_was_taken_out_is_no_error_where_the_answer_was_lost(adapters: Adapters, server: Any) -> None:
    for version in (1, 2):
        registry.register(server, "able", "style", version, {"rank": 8}, promote=True)
    with one_lost_answer(b"unload\r\n"):
        assert adapters.unload("style@1", "able").versions.keys() == {2}
    with pytest.raises(UnknownAdapter, match="style@1"):
        adapters.unload("style@1", "able")
    adapters.deactivate("style", "able")
    with one_lost_answer(b"unload\r\n"):
        assert adapters.unload("style@2", "able").versions == {}, "its last one"


def test_a_change_that_the_registry_refuses_is_an_error_that_says_why(adapters: Adapters, server: Any) -> None:
    registry.register(server, "able", "style", 1, {"rank": 8}, promote=True)
    with pytest.raises(InvalidRequest, match=r"style@1.*serves"):
        adapters.unload("style@1", "able")
    with pytest.raises(UnknownAdapter, match="style@9"):
        adapters.promote("style@9", "able")
    assert adapters.get("style", "able").serving == 1


def test_a_record_says_how_much_its_job_asks_for(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        sent = {
            client.embed(["a", "b"], model="mini").id: "2 texts",
            client.generate("x", model="smol", max_tokens=7, n=3).id: "21 tokens",
            client.train("style", [{"text": "a"}], model="smol", steps=5).id: "5 steps",
            client.train("style", [{"text": "a"}], model="smol", epochs=2).id: "2 epochs",
        }
    assert {job_id: server.hget(keys.job(job_id), Field.SIZE).decode() for job_id in sent} == sent


def test_both_clients_wait_for_a_broker_that_loads(server: Any) -> None:
    """`test_loading` has what the waiting is."""

    async def of_asyncio() -> Any:
        async with AsyncClient() as client:
            return client.redis.get_retry()

    with Client() as client:
        assert isinstance(client.redis.get_retry(), PatientRetry)
    assert isinstance(asyncio.run(of_asyncio()), AsyncPatientRetry)


class Troubled(Connections):
    """Of the listeners it gives, the first one meets trouble where its reader says."""

    def __init__(self, settings: Settings, where: str) -> None:
        super().__init__(settings)
        self.given = [Doubted(where), Doubted("")]
        self._left = list(self.given)

    def listener(self) -> Any:
        return self._left.pop(0)


class Doubted:
    """A listener that hears nothing. `doubts`: how often its reader doubted it."""

    def __init__(self, troubled: str) -> None:
        self.doubts, self.closed, self._troubled = 0, False, troubled

    async def subscribe(self, *channels: str) -> None:
        if self._troubled == "subscribe":
            raise RedisConnectionError("away")

    async def get_message(self, timeout: float) -> None:
        if self._troubled == "get_message":
            raise RedisConnectionError("away")
        await asyncio.sleep(0)

    def doubt(self) -> None:
        assert not self.closed
        self.doubts += 1

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("where", ["subscribe", "get_message"])
def test_a_reader_that_meets_trouble_doubts_its_connection_and_no_other(
    fake: Callable[[], Client], server: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be dead, and say nothing of it: the next reader is to have another one, after a pause."""
    pauses: list[float] = []

    async def noted(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(following.Follower, "pause", lambda *_: 0.25)
    monkeypatch.setattr(broker_link, "sleep", noted)
    with fake() as client:
        job = client.generate("x", model="smol")
        settings = client.settings

    async def read() -> list[Doubted]:
        connections = Troubled(settings, where)
        link = AsyncBrokerLink(settings, connections)
        reading = asyncio.ensure_future(link.value(job.id, 30))
        while not connections.given[0].closed:
            await asyncio.sleep(0)
        failed(server, job.id)
        with pytest.raises(JobFailed):
            await reading
        await link.close()
        return connections.given

    first, second = asyncio.run(read())
    assert [(one.doubts, one.closed) for one in (first, second)] == [(1, True), (0, True)]
    assert pauses[0] == 0.25


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_a_full_queue_is_asked_again_after_a_pause(
    client_class: type[Client | AsyncClient],
    fake: Callable[[], Client],
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that asked without one would keep the broker from its work."""
    pauses: list[float] = []

    def made_room(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            server.delete(keys.POLICY)

    async def made_room_soon(seconds: float) -> None:
        made_room(seconds)

    async def send(settings: Settings) -> None:
        async with AsyncClient(settings=settings) as client:
            await client.generate("y", model="smol")

    with fake() as client:
        client.generate("x", model="smol")
        settings = client.settings.model_copy(update={"queue_wait": 3600.0})
    server.hset(keys.POLICY, "queue_limit", 1)
    monkeypatch.setattr(broker_link, "sleep", made_room_soon)
    monkeypatch.setattr(blocking_link, "sleep", made_room)
    if client_class is AsyncClient:
        asyncio.run(send(settings))
    else:
        with Client(settings=settings) as client:
            client.generate("y", model="smol")
    assert len(pauses) == 3
    assert all(0.1 <= seconds <= 5 for seconds in pauses)
