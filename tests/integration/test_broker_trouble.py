"""A broker that dies, freezes, drops connections or forgets: one clear error, or the result once it is back."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stoker import Client
from stoker.broker import keys
from stoker.errors import BrokerUnavailable, JobLost
from stoker.local.broker import server_binary
from stoker.local.process import Process
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import EMBED_MODEL, alive, stack_settings, wait_until
from tests.integration.machinery import (
    PROMPT,
    FragileBroker,
    Proxy,
    endless_in,
    long_answer,
    owner_in_the_middle,
    patient_client,
    worker_on,
)
from tests.leaks import overlong_keys
from tests.tls import authority, signed

pytestmark = pytest.mark.integration

#: What a worker logs whose sign of life the broker does not take.
HELD_BACK = "'presence' waits for the broker"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FragileBroker, Stack]]:
    """A broker and a worker for what both outlive."""
    folder = tmp_path_factory.mktemp("served")
    broker = FragileBroker(folder / "fragile")
    try:
        with worker_on(broker, folder / "worker", models=(EMBED_MODEL, endless_in(folder))) as stack:
            yield broker, stack
    finally:
        broker.close()


def test_a_stream_goes_on_when_the_broker_was_killed_and_is_back(served: tuple[FragileBroker, Stack]) -> None:
    fragile, stack = served
    with patient_client(fragile.url, 60) as client:
        pid, wanted = client.workers()[0].pid, long_answer(client).result(60)
        # `everysec` may lose the last second of writes, the job itself among them.
        client.redis.config_set("appendfsync", "always")
        job = long_answer(client)
        stream = job.stream(timeout=60)
        heard = [next(stream) for _ in range(3)]
        assert owner_in_the_middle(client, job) == pid
        fragile.kill()
        time.sleep(1.0)
        fragile.start()
        assert tuple(token.token_id for token in [*heard, *stream]) == wanted.token_ids
        assert job.result(60).text == wanted.text
        presence = wait_until(lambda: client.workers(), "the worker is back")
        assert presence[0].pid == pid, "the worker must survive its broker"
        wait_until(lambda: client.redis.hlen("stoker:unacked") == 0, "nothing is left unacknowledged")
        assert not overlong_keys(client.redis)
        assert stack.worker_name == presence[0].worker


def test_dropped_connections_neither_end_the_worker_nor_run_a_job_twice(served: tuple[FragileBroker, Stack]) -> None:
    """kombu 5.7.0 alone fails this: the late ack on a closed channel ends the worker (workers/celery/transport.py)."""
    fragile, stack = served
    with patient_client(fragile.url, 60) as client:
        pid, wanted = client.workers()[0].pid, long_answer(client).result(60)
        job = long_answer(client)
        stream = job.stream(timeout=60)
        heard = [next(stream)]
        for _ in range(2):
            fragile.drop_connections()
            heard.append(next(stream))
        heard += stream
        assert tuple(token.token_id for token in heard) == wanted.token_ids
        wait_until(lambda: client.redis.hlen("stoker:unacked") == 0, "nothing is left unacknowledged")
        vectors = client.embed(["still there"], model=EMBED_MODEL).result(30)
        assert vectors.shape == (1, 384)
        assert client.workers()[0].pid == pid
        log = _log_of(stack)
        assert log.count(f'"event": "begun", "job": "{job.id}"') == 1
        be_a_replica_for_a_while(client, stack)
        assert client.embed(["still there"], model=EMBED_MODEL).result(30).shape == (1, 384)
        assert client.workers()[0].pid == pid


def be_a_replica_for_a_while(client: Client, stack: Stack) -> None:
    """As a broker is in a fail-over: it answers, and takes nothing. Until the worker has met that."""
    earlier = _log_of(stack).count(HELD_BACK)
    client.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    wait_until(lambda: _log_of(stack).count(HELD_BACK) > earlier, "the worker was refused")
    client.redis.execute_command("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("how", ["killed", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_broker_that_stays_away_is_one_clear_error(fragile: FragileBroker, tmp_path: Path, how: str) -> None:
    with (
        worker_on(fragile, tmp_path / "worker", models=(endless_in(tmp_path),)) as stack,
        patient_client(fragile.url, 1.0) as client,
    ):
        worker = client.workers()[0].pid
        job = client.generate(PROMPT, model=endless.MODEL, max_tokens=4000)
        stream = job.stream()
        next(stream)
        pid = fragile.pid
        os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        try:
            with pytest.raises(BrokerUnavailable, match="stoker up"):
                list(stream)
            with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{fragile.port}"):
                job.result()
            # A worker that is asked to stop meanwhile does: the job's lease will bring it elsewhere.
            os.kill(worker, signal.SIGTERM)
            wait_until(lambda: not alive(worker), "the worker has ended by itself", 30)
            log = _log_of(stack)
            assert "ending without it" in log
            # What kombu, redis-py and Celery say of a lost connection names neither a password nor what was asked.
            password = urlsplit(fragile.url).password
            assert password
            assert password not in log
            assert PROMPT not in log
        finally:
            if how == "frozen":
                os.kill(pid, signal.SIGCONT)


def test_a_broker_whose_memory_is_full_takes_nothing_new_and_loses_nothing(served: tuple[FragileBroker, Stack]) -> None:
    fragile, stack = served
    with patient_client(fragile.url, 60) as client:
        pid, wanted = client.workers()[0].pid, long_answer(client).result(60)
        job = long_answer(client)
        stream = job.stream(timeout=60)
        heard = [next(stream) for _ in range(3)]
        client.redis.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match="no memory left"):
            client.generate("x", model=endless.MODEL)
        length = client.redis.xlen(keys.stream(job.id))
        wait_until(lambda: "used memory > 'maxmemory'" in _log_of(stack), "it is felt")
        assert client.redis.xlen(keys.stream(job.id)) <= length + 1
        client.redis.config_set("maxmemory", 0)
        assert tuple(token.token_id for token in [*heard, *stream]) == wanted.token_ids
        assert job.result(60).text == wanted.text
        assert client.embed(["still there"], model=EMBED_MODEL).result(60).shape == (1, 384)
        assert client.workers()[0].pid == pid
        wait_until(lambda: client.redis.hlen("stoker:unacked") == 0, "nothing is left unacknowledged")


def _log_of(stack: Stack) -> str:
    return (stack.settings.logs / "worker.log").read_text()


def test_a_broker_that_comes_back_empty_has_lost_the_job_and_the_client_hears_it(
    served: tuple[FragileBroker, Stack],
) -> None:
    fragile, _ = served
    with patient_client(fragile.url, 60) as client:
        run = client.train("x", [{"text": "a b c"}], model=endless.MODEL, steps=100_000, max_length=16)
        next(iter(run.progress(timeout=60)))
        fragile.drop_connections()
        client.redis.flushall()
        with pytest.raises(JobLost, match="lost its data"):
            run.result()


@pytest.mark.slow
def test_a_unix_socket_serves_clients_and_workers(tmp_path: Path) -> None:
    # Not under tmp_path: a socket's path may have 104 bytes at most on macOS.
    with tempfile.TemporaryDirectory(prefix="stk") as folder:
        path = Path(folder) / "s"
        options = ["--port", "0", "--unixsocket", str(path), "--dir", folder, "--save", ""]
        server = Process("broker", [str(server_binary()), *options], log=tmp_path / "socket.log", env={}, grace=5)
        try:
            wait_until(path.exists, "the socket is there")
            _round_trip(f"redis+socket://{path}?virtual_host=2", tmp_path)
        finally:
            server.stop()


def test_tls_serves_clients_and_workers(fragile: FragileBroker, tmp_path: Path) -> None:
    """With an authority of its own, which has signed the certificates of both sides."""
    ours = authority(tmp_path, "ours")
    server = signed(ours, "broker", "IP:127.0.0.1").server(clients=ours)
    proxy = Proxy(fragile.port, tls=server)
    try:
        own = signed(ours, "worker", "DNS:worker").options
        _round_trip(f"{proxy.url_of(fragile)}?ssl_ca_certs={ours.certificate}&{own}", tmp_path)
    finally:
        proxy.close()


def _round_trip(url: str, tmp_path: Path) -> None:
    settings = stack_settings(tmp_path / "worker", url=url).model_copy(update={"models": (EMBED_MODEL,)})
    with Stack(settings, flower=False) as stack:
        stack.wait_until_warm()
        with Client(url) as client:
            assert client.embed(["through"]).result(30).shape == (1, 384)
