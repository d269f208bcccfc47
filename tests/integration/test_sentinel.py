"""A fail-over in the middle of a stream: the primary is killed, and a replica that lacks a part of it takes over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker import AsyncClient
from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.cli import app
from stoker.local.stack import Stack
from stoker.settings import Settings
from tests.conftest import GENERATE_MODEL, stack_settings, wait_until
from tests.integration.machinery import GOLDENS, patient_client
from tests.integration.sentinels import ASKING, watched
from tests.monitor.conftest import Running
from tests.workers.test_publishing import token
from workers.services.publishing import Publisher

pytestmark = pytest.mark.integration

GOLDEN = GOLDENS[0]


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def connections(monitor: Running) -> list[Any]:
    """What each worker says of its own."""
    workers = monitor.ask("/api/workers?refresh=1").json
    return [inspected.get("stats", {}).get("broker") for inspected in workers.values()]


async def text_of_another(url: str) -> str:
    async with AsyncClient(settings=Settings(url=url, patience=60)) as client:
        job = await client.generate(GOLDEN["prompt"], model=GENERATE_MODEL, max_tokens=64)
        return (await job.result(60)).text


def test_what_is_published_goes_on_at_the_new_primary_and_has_no_gap(tmp_path: Path) -> None:
    """The quick form: a publisher and a reader, without a worker."""
    with watched(tmp_path) as broker:
        redis = connect(Settings(url=broker.url("worker")))
        publisher = Publisher(redis)
        publisher.start()
        publisher.publish([("a", token(index)) for index in range(3)])
        publisher.flush("a")
        with broker.primary.client() as admin:
            assert admin.wait(1, 10_000) == 1, "the replica has these"
        broker.stop_replicating()
        publisher.publish([("a", token(index)) for index in range(3, 6)])
        publisher.flush("a")
        broker.kill_primary()
        publisher.publish([("a", token(index)) for index in range(6, 9)])
        publisher.flush("a")
        found = [entry_id.decode() for entry_id, _ in redis.xrange(keys.stream("a"))]
        publisher.stop()
        assert found == [keys.entry_id(index) for index in range(9)]
        assert broker.denied() == []


@pytest.mark.slow
def test_a_stream_goes_on_at_the_new_primary_and_has_no_gap(tmp_path: Path) -> None:
    with watched(tmp_path) as broker, ExitStack() as leaving:
        settings = stack_settings(tmp_path / "home", url=broker.url("worker"), models=(GENERATE_MODEL,), grace=1.0)
        with Stack(settings, flower=False) as stack, patient_client(broker.url("client"), 60) as client:
            presence = stack.wait_until_warm()
            (tmp_path / "monitor").mkdir()
            monitor = Running(Settings(url=broker.url("flower"), home=tmp_path / "monitor"))
            leaving.callback(monitor.stop)
            wait_until(lambda: monitor.seen()["workers"], "the worker is seen")
            wait_until(lambda: connections(monitor) == [{"url": settings.address.shown}], "the worker is inspected")
            job = client.generate(GOLDEN["prompt"], model=GENERATE_MODEL, max_tokens=64)
            stream = job.stream(timeout=60)
            heard = [next(stream)]
            with broker.primary.client() as admin:
                # The monitor looks once a second, and the rest of the job may take less.
                with frozen(presence.pid):
                    wait_until(lambda: monitor.state(job.id) == "STARTED", "Flower sees it begin")
                    assert admin.wait(1, 10_000) == 1, "the replica has the job"
                    broker.stop_replicating()
                    replicated = admin.xlen(keys.stream(job.id))
                wait_until(lambda: admin.xlen(keys.stream(job.id)) > replicated, "the replica lacks a token")
                heard += [next(stream) for _ in range(replicated)]
                assert admin.xlen(keys.stream(job.id)) < len(GOLDEN["token_ids"]), "it is in the middle"
            broker.kill_primary()
            heard += stream
            assert [token.token_id for token in heard] == GOLDEN["token_ids"]
            assert job.result(60).text == GOLDEN["text"]
            # A reader that comes later sees the same, also what the replica had not got.
            assert [token.index for token in job.stream(timeout=60)] == list(range(len(GOLDEN["token_ids"])))
            with broker.replica.client() as admin:
                assert admin.role()[0] == "master"
            assert "the broker lost entries from" in (stack.settings.logs / "worker.log").read_text()
            assert asyncio.run(text_of_another(broker.url("client"))) == GOLDEN["text"]
            assert client.workers()[0].pid == presence.pid, "the worker outlives its broker"
            wait_until(lambda: client.redis.hlen(keys.UNACKED) == 0, "nothing is left unacknowledged")
            wait_until(lambda: monitor.state(job.id) == "SUCCESS", "Flower sees it too")
            assert monitor.seen()["workers"]
            shown = CliRunner().invoke(app, ["status", "--url", broker.url("client")])
            assert presence.worker in shown.output
            assert broker.denied() == []
        log = (stack.settings.logs / "worker.log").read_text()
    assert "worker-password" not in log
    assert ASKING not in log
