"""The users that `deploy/acl` gives a broker: each can do what its program does, and nothing of the others'."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.entity import Queue
from kombu.messaging import Consumer
from kombu.pidbox import Mailbox
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from stoker import Client
from stoker.broker import keys, ledger, policy, prefixes, registry
from stoker.broker.batches import Batches, BatchRecord, Lease
from stoker.broker.connection import connect, connect_async
from stoker.broker.fine_tunes import FineTune, FineTunes
from stoker.broker.functions import Functions
from stoker.broker.stored_files import FileRecord, StoredFiles
from stoker.broker.trouble import forbids
from stoker.celery_config import shared_config
from stoker.client._sync.jobs import EmbedJob
from stoker.contract import GenerateResult, ModelCard, Presence, StreamToken, Usage, encode
from stoker.contract.codec import read
from stoker.contract.control import ModelCommand, ModelReport
from stoker.errors import BrokerUnavailable, DeadlineExceeded, JobTimeout
from tests.conftest import wait_until
from tests.monitor.conftest import Running
from tests.stoker.acl import Guarded, guarded_broker
from workers import clock
from workers.celery import transport
from workers.celery.transport import WorkerConnection
from workers.deliveries import Deliveries, Health
from workers.services.placing import Placing
from workers.services.publishing import Publisher

CARD = ModelCard(model="m", architecture="a", kinds=("generate", "train", "adapters"), context=1, parameters=1)
QUEUE = keys.queue("m", "generate")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_broker(tmp_path_factory.mktemp("acl")) as running:
        yield running


@pytest.fixture
def worker(broker: Guarded) -> Iterator[Any]:
    """What a worker writes, by hand: it is there, serves a model, and has made two versions of an adapter."""
    broker.admin.flushall()
    broker.admin.function_flush()
    broker.denied()
    with closing(connect(broker.settings("worker"), loads_functions=True)) as redis:
        now = clock.now(redis)
        presence = Presence(worker="w", host="h", pid=1, device="cpu", started=now, time=now, models=(CARD,),
                            adapters={}, lanes={}, memory_bytes=0)  # fmt: skip
        redis.set(keys.worker("w"), presence.model_dump_json(), ex=60)
        redis.set(keys.metrics("w"), "{}", ex=60)
        redis.delete(keys.metrics("w"))
        redis.zadd(keys.WORKERS, {"w": now})
        redis.hset(keys.MODELS, "m/1", CARD.model_copy(update={"seen": now}).model_dump_json())
        for version in (1, 2):
            registry.register(redis, "m", "a", version, {"rank": 1}, promote=True)
            redis.set(keys.artifact("m", "a", version), b"x")
        yield redis


@pytest.fixture
def client(broker: Guarded, worker: Any) -> Iterator[Client]:
    with Client(settings=broker.settings("client")) as made:
        yield made


def take(redis: Any) -> str:
    """What a worker does with the next message."""
    _, raw = redis.brpop(keys.ready(QUEUE), 5)
    message = json.loads(raw)
    job_id, tag = message["headers"]["id"], message["properties"]["delivery_tag"]
    clock.hold(redis, tag, raw)
    assert ledger.claim(redis, job_id, QUEUE, "token", tag, "w").state == "run"
    return str(job_id)


def finish(redis: Any, job_id: str) -> None:
    token = StreamToken(index=0, token_id=1, text="x", logit=0.0, logprob=0.0, probability=1.0, finish_reason="stop")
    publisher = Publisher(redis)
    publisher.start()
    publisher.publish([(job_id, token)])
    publisher.flush(job_id)
    publisher.stop()
    result = GenerateResult(text="x", token_ids=(1,), finish_reason="stop", model="m", adapter=None, usage=Usage())
    fields = encode(result)
    del fields["contract"]
    assert ledger.complete(redis, job_id, QUEUE, "token", ledger.success(job_id, fields))


def test_a_job_goes_from_its_client_to_its_worker_and_back(broker: Guarded, client: Client, worker: Any) -> None:
    job = client.generate("x", max_tokens=1)
    assert list(client.jobs()) == [job.id]
    finish(worker, take(worker))
    assert [token.text for token in job.stream(timeout=5)] == ["x"]
    assert job.result(5).text == "x"
    assert job.status() == "done"
    EmbedJob(client.link, job.id).discard()
    assert broker.denied() == []


def test_a_worker_passes_jobs_on_and_recalls_them(broker: Guarded, client: Client, worker: Any) -> None:
    client.generate("x")
    job_id, placing = take(worker), Placing(broker.settings("worker"), "w", worker)
    placing.note(["0" * 32])
    assert placing.better("m", ["0" * 32]) is None
    assert placing.memories("m") == []
    assert ledger.pass_on(worker, job_id, QUEUE, "token", "v") == "passed"
    assert worker.brpop([keys.placed(QUEUE, "w"), keys.ready(QUEUE)], 0.01) is None
    assert ledger.recall(worker, job_id, QUEUE, "v")
    assert broker.denied() == []


def test_a_worker_loads_the_functions_and_clients_call_them(
    broker: Guarded, client: Client, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.admin.config_resetstat()
    first = client.generate("x")
    assert take(worker) == first.id
    monkeypatch.setattr(client.redis, "functions", Functions())
    client.generate("y")
    counted = broker.admin.info("commandstats")
    assert counted["cmdstat_evalsha"]["calls"] - counted["cmdstat_evalsha"]["failed_calls"] <= 1, "the first submission"
    assert counted["cmdstat_function|load"]["calls"] == 1
    assert counted["cmdstat_fcall"]["calls"] - counted["cmdstat_fcall"]["failed_calls"] == 2
    assert broker.denied() == []


def test_a_client_cancels_uploads_retries_and_changes_adapters(broker: Guarded, client: Client, worker: Any) -> None:
    broker.admin.hset(keys.POLICY, "result_seconds", 60)
    waiting, running = client.generate("x"), client.generate("y")
    waiting.cancel()
    taken = take(worker)
    assert taken == running.id
    running.cancel()
    assert worker.exists(keys.cancel(taken))
    ledger.complete(worker, taken, QUEUE, "token", ledger.revoked(taken))
    again = client.generate("z")
    take(worker)
    assert not ledger.dead_letter(worker, again.id, QUEUE, "token", "w", "the disk is full").fenced
    ledger.complete(worker, again.id, QUEUE, "token", ledger.failure(again.id, ValueError("x")))
    assert list(client.dead()) == [again.id]
    client.retry(again.id)
    small = client.train("a", [{"text": "x"}])
    large = client.train("a", [{"text": "x" * 1000}] * 9000)
    for run in (small, large):
        run.cancel()
    client.adapters.rollback("a")
    client.adapters.promote("a@2")
    client.adapters.unload("a@1")
    assert client.adapters.get("a").serving == 2
    worker.set(keys.client("default", QUEUE), "garbage", ex=60)
    client.generate("x").cancel()
    with pytest.raises(DeadlineExceeded):
        client.generate("x", deadline=0.01).result(30)
    assert broker.denied() == []


def test_a_gateway_keeps_and_lists_training_runs_files_and_batches(broker: Guarded, worker: Any) -> None:
    run = FineTune(
        id="run", owner="alice", created=int(clock.now(worker)), model="m", adapter="a", training_file="f",
        batch_size=1, multiplier=1.0, seed=1,
    )  # fmt: skip
    file = FileRecord(
        id=f"file-{0:032x}", owner="alice", filename="f", purpose="batch", created=clock.now(worker),
        expires=int(clock.now(worker)) + 60, place="here",
    )  # fmt: skip
    batch = BatchRecord(
        id="batch_1", owner="alice", key=None, models=None, endpoint="/v1/embeddings", input_file=file.id, place="here",
        window="24h", metadata=None, created=clock.now(worker), expires=10, lifetime=20,
    )  # fmt: skip
    worker.xadd(keys.stream(run.id), {"entry": b"report"}, keys.entry_id(0))
    worker.expire(keys.stream(run.id), 60)

    async def asked() -> None:
        redis = connect_async(broker.settings("client"))
        try:
            await train(FineTunes(redis))
            await store(StoredFiles(redis))
            await run_batch(Batches(redis), Lease(redis, "here"))
        finally:
            await redis.aclose()

    async def train(runs: FineTunes) -> None:
        assert await runs.add(run) == run
        assert [found async for found in runs.listed("alice")] == [run]
        assert await runs.reports(run.id, None, 1) == [b"report"]
        await runs.end(run)
        await runs.forget(run)

    async def store(files: StoredFiles) -> None:
        await files.reserve("here", file.id, file.expires)
        await files.keep(file)
        assert [found async for found in files.listed("alice")] == [file]
        await files.forget(file)
        assert await files.over("here") == [file.id]
        await files.gone("here", file.id)

    async def run_batch(batches: Batches, lease: Lease) -> None:
        await batches.create(batch)
        await batches.cancel(batch.id, 1)
        assert await batches.open("here") == [found async for found in batches.listed("alice")]
        assert await lease.take()
        assert await lease.renew()
        assert await batches.write(batch.model_copy(update={"status": "completed"}), lease.holder)
        await lease.give_back()

    asyncio.run(asked())
    assert broker.denied() == []
    worker.delete(keys.stream(run.id))


def test_a_worker_recovers_what_was_lost_and_moves_aside_what_is_spoiled(
    broker: Guarded, client: Client, worker: Any
) -> None:
    from workers.services.mending import Mender

    client.generate("x")
    worker.rpop(keys.ready(QUEUE))
    time.sleep(0.01)
    assert len(ledger.recover(worker, QUEUE, 0.001)) == 1
    assert take(worker)
    for key in (keys.POLICY, keys.open_jobs(QUEUE), keys.ready(QUEUE), keys.prefixes("m")):
        broker.admin.delete(key)
        broker.admin.set(key, "garbage")
    assert Mender(worker, lambda: [QUEUE], "w").round()
    assert broker.denied() == []


def celery_as(broker: Guarded, role: str) -> Celery:
    """Celery's own part, as workers and Flower have it: queues, control messages, events."""
    transport.install()
    settings = broker.settings(role)
    app = Celery("stoker", backend=settings.address.celery)
    app.conf.update(shared_config(settings))
    return app


@pytest.mark.parametrize("role", ["worker", "flower"])
def test_control_messages_and_events_pass(broker: Guarded, worker: Any, role: str) -> None:
    with celery_as(broker, role) as app, app.connection() as connection:
        assert app.control.inspect(timeout=0.2).ping() is None
        receiver = app.events.Receiver(connection, handlers={"*": lambda event: None})
        with suppress(TimeoutError):
            receiver.capture(limit=1, timeout=0.2, wakeup=True)
        connection.transport.cycle.poller.close()
    assert broker.denied() == []


def test_a_worker_takes_holds_and_hands_back_messages_as_kombu_does(
    broker: Guarded, client: Client, worker: Any
) -> None:
    client.generate("x")
    options = shared_config(broker.settings("worker"))["broker_transport_options"] | {"visibility_timeout": 1}
    deliveries = Deliveries(Health(1))
    url = broker.settings("worker").address.celery
    with WorkerConnection(url, transport_options=options, deliveries=deliveries) as connection:
        channel = connection.default_channel
        heard: list[Any] = []
        node = Mailbox("celery", type="fanout").Node("w", channel=channel)
        node.listen(callback=lambda body, message: None)
        consumer = Consumer(channel, [Queue(QUEUE)], on_message=heard.append)
        consumer.consume()
        while not heard:
            connection.drain_events(timeout=5)
        heard[0].reject(requeue=True)
        while len(heard) == 1:
            connection.drain_events(timeout=5)
        heard[1].ack()
        channel.qos.restore_visible(interval=1)
        poller = connection.transport.cycle.poller
    poller.close()
    assert broker.denied() == []


def test_the_monitor_sees_jobs_runs_and_letters(broker: Guarded, client: Client, worker: Any, tmp_path: Path) -> None:
    monitor = Running(broker.settings("flower").model_copy(update={"home": tmp_path}))
    try:
        spoken, run = client.generate("x", max_tokens=1), client.train("a", [{"text": "x"}])
        wait_until(lambda: monitor.state(spoken.id) and monitor.state(run.id), "both are seen")
        assert take(worker) == spoken.id
        wait_until(lambda: monitor.state(spoken.id) == "STARTED", "it runs")
        finish(worker, spoken.id)
        wait_until(lambda: monitor.state(spoken.id) == "SUCCESS", "it has ended")
        broker.admin.hset(keys.DEAD, "letter", json.dumps({"kind": "generate", "model": "m", "client": "c"}))
        wait_until(lambda: monitor.seen()["dead"], "the letter is seen")
        assert [entry["name"] for entry in monitor.seen()["adapters"]] == ["a"]
    finally:
        monitor.stop()
    assert broker.denied() == []


def test_an_operator_asks_a_worker_about_its_models_and_a_client_may_not(
    broker: Guarded, client: Client, worker: Any
) -> None:
    def answer() -> None:
        _, raw = worker.brpop([keys.commands("w")], 30)
        asked = read(ModelCommand, raw.decode())
        report = ModelReport(id=asked.id, worker="w", verb=asked.verb, model=asked.model, phase="done")
        worker.set(keys.command(asked.id), report.model_dump_json(), ex=60)

    with Client(settings=broker.settings("operator")) as operator:
        answering = threading.Thread(target=answer)
        answering.start()
        assert operator.models.pin("m", timeout=30).model == "m"
        answering.join()
        with pytest.raises(JobTimeout, match="nothing was done"):
            operator.models.load("x=/x", timeout=0.0)
    assert not worker.exists(keys.commands("w"))
    assert broker.denied() == []
    with pytest.raises(BrokerUnavailable, match="forbids it"):
        client.models.pin("m")
    broker.denied()


def test_an_operator_pins_prefixes_which_workers_read_and_clients_list(
    broker: Guarded, client: Client, worker: Any
) -> None:
    with Client(settings=broker.settings("operator")) as operator:
        operator.prefixes.pin("a", "x", timeout=0.0)
        operator.prefixes.pin("b", "y", timeout=0.0)
        operator.prefixes.unpin("b")
        assert [entry.name for entry in operator.prefixes.list()] == ["a"]
    assert worker.hget(keys.prefixes("m"), prefixes.CHANGED)
    assert list(prefixes.parse(worker.hgetall(keys.prefixes("m")))) == ["a"]
    assert [entry.name for entry in client.prefixes.list()] == ["a"]
    assert broker.denied() == []
    for change in (lambda: client.prefixes.pin("c", "x"), lambda: client.prefixes.unpin("a")):
        with pytest.raises(BrokerUnavailable, match="forbids it"):
            change()
    broker.denied()


def test_an_operator_sets_the_policy_and_nothing_else(broker: Guarded) -> None:
    with closing(connect(broker.settings("operator"))) as redis:
        policy.decide(redis, "queue_limit", 5)
        assert policy.read(redis)["queue_limit"] == 5
        policy.decide(redis, "queue_limit", None)
        for command in (("HSET", keys.job("x"), "a", "b"), ("GET", keys.result("x")), ("EVAL", "return 1", 0)):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command)


#: What nobody of them may do.
FOR_NOBODY = (
    *(("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("SCAN", 0), ("ACL", "LIST"), ("SHUTDOWN",), ("MONITOR",)),
    *(("REPLICAOF", "NO", "ONE"), ("CLIENT", "KILL", "TYPE", "normal"), ("SWAPDB", 0, 1), ("PUBLISH", "another", "x")),
    *(("GET", "another:key"), ("SET", "another:key", "x"), ("HSET", keys.POLICY, "crashes", 9)),
    *(("EVAL", "return redis.call('FLUSHALL')", 0), ("FUNCTION", "FLUSH"), ("FUNCTION", "DUMP"), ("FUNCTION", "KILL")),
)
#: What loads a library may replace what another user calls with rights of its own.
LIBRARY = "#!lua name=another\nredis.register_function('another', function() return 1 end)"
FOR_WORKERS = (
    *(("FUNCTION", "LOAD", "REPLACE", LIBRARY), ("FUNCTION", "LIST"), ("FUNCTION", "DELETE", "another")),
    *(("XADD", keys.stream("x"), "*", "entry", "x"), ("PUBLISH", keys.channel("x"), "x")),
    *(
        ("SET", keys.worker("x"), "x"),
        ("SET", keys.metrics("x"), "x"),
        ("ZADD", keys.WORKERS, 1, "x"),
        ("HSET", keys.MODELS, "x", "x"),
    ),
    *(("ZADD", keys.LEASES, 1, "x"), ("DEL", keys.UNACKED), ("BRPOP", keys.ready(QUEUE), 0.01)),
)
FOR_CLIENTS = (
    *(("HSET", keys.job("x"), "a", "b"), ("SET", keys.blob("dataset:x"), "x"), ("LPUSH", keys.ready(QUEUE), "x")),
    *(("SET", keys.result("x"), "x"), ("HSET", keys.adapter("m", "x"), "serving", "1")),
    *(("PUBLISH", keys.CANCELS, "x"), ("EVAL", "return 1", 1, keys.job("x"))),
    ("FCALL", "another", 1, keys.job("x")),
)


@pytest.mark.parametrize(
    ("role", "forbidden"),
    [
        ("client", (*FOR_NOBODY, *FOR_WORKERS)),
        ("worker", FOR_NOBODY),
        ("flower", (*FOR_NOBODY, *FOR_CLIENTS, *FOR_WORKERS)),
    ],
)
def test_no_role_can_do_what_is_anothers(broker: Guarded, role: str, forbidden: tuple[tuple[Any, ...], ...]) -> None:
    with closing(connect(broker.settings(role))) as redis:
        allowed = []
        for command in forbidden:
            try:
                redis.execute_command(*command)
                allowed.append(command)
            except ResponseError as error:
                allowed += [] if forbids(error) else [command]
        assert not allowed


def test_nobody_without_a_password_is_let_in(broker: Guarded) -> None:
    settings = broker.settings("client").model_copy(update={"url": f"redis://127.0.0.1:{broker.port}/0"})
    with closing(connect(settings)) as redis, pytest.raises(AuthenticationError):
        redis.ping()


def test_a_client_hears_that_it_is_forbidden(broker: Guarded) -> None:
    with (
        Client(settings=broker.settings("operator")) as client,
        pytest.raises(BrokerUnavailable, match=r"forbids it .*deploy/acl") as refusal,
    ):
        client.dead()
    assert "password" not in str(refusal.value)
