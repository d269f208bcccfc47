"""Brokers and workers that a test may kill, freeze and bring back."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import SystemRandom
from typing import Any

from stoker import Client, GenerateJob
from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.local.broker import EmbeddedBroker, free_port
from stoker.local.stack import Stack
from stoker.settings import Settings
from tests import endless
from tests.conftest import EMBED_MODEL, GENERATE_MODEL, stack_settings

#: Prompts, and what transformers makes of them greedily (tests/goldens).
GOLDENS = json.loads((Path(__file__).parent.parent / "goldens" / "smollm2.json").read_text())["prompts"]


def own_port() -> int:
    """A free port from below those that systems hand out: while a broker is away, no connection can be given it."""
    while True:
        port = SystemRandom().randrange(15_000, 32_000)
        if free_port(port) == port:
            return port


class FragileBroker:
    """An embedded broker on a port of its own, which can die and come back."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home)
        self.port = own_port()
        self._broker: EmbeddedBroker | None = None
        self.url = ""
        self.start()

    def start(self) -> None:
        self._broker = EmbeddedBroker(self.settings, port=self.port)
        url = self._broker.start()
        assert self.url in ("", url), "the broker has to come back where it was"
        self.url = url

    @property
    def pid(self) -> int:
        client = connect(Settings(url=self.url))
        pid = int(client.info()["process_id"])
        client.close()
        return pid

    def kill(self) -> None:
        """`kill -9`: nothing is kept except what the append-only file has."""
        pid = self.pid
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        self.close()

    def drop_connections(self) -> None:
        """Close every connection except the one that asks."""
        client = connect(Settings(url=self.url))
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        client.close()

    def close(self) -> None:
        if self._broker is not None:
            self._broker.stop()
            self._broker = None


#: A decoder of a few thousand random weights, which a worker has warm at once: for what does not depend on a model.
TINY_MODEL = "tiny"
TINY = f"{TINY_MODEL}={Path(__file__).parent.parent / 'goldens' / 'architectures' / 'qwen3'}"


def endless_in(folder: Path) -> str:
    """The decoder of long answers, for a worker's `models`."""
    return f"{endless.MODEL}={endless.write(folder)}"


@contextmanager
def worker_on(
    broker: FragileBroker, home: Path, *, models: tuple[str, ...] = (EMBED_MODEL, GENERATE_MODEL), **settings: Any
) -> Iterator[Stack]:
    """A worker of the broker, warm."""
    # Little grace: a worker whose broker is gone for good has nobody to hand its jobs back to, and is killed after it.
    chosen = stack_settings(home, url=broker.url, grace=1.0, models=models, **settings)
    with Stack(chosen, flower=False) as stack:
        stack.wait_until_warm()
        yield stack


@contextmanager
def two_workers_on(broker: FragileBroker, folder: Path, model: str, **more: Any) -> Iterator[None]:
    """They start at the same time: each reads the same weights."""
    settings = [
        stack_settings(folder / name, url=broker.url, grace=1.0, models=(model,), **more) for name in ("one", "two")
    ]
    with ExitStack() as leaving:
        stacks = [leaving.enter_context(Stack(each, flower=False)) for each in settings]
        for stack in stacks:
            stack.wait_until_warm()
        yield


#: Tokens of a long answer: a second of them.
LONG = 250
PROMPT = "Once upon a time"


def long_answer(client: Client) -> GenerateJob:
    """Always the same one, whose tokens are of all kinds."""
    return client.generate(PROMPT, model=endless.MODEL, max_tokens=LONG, temperature=0.8, seed=7)


def owner_in_the_middle(client: Client, job: GenerateJob) -> int:
    """The process that runs the long answer. Both workers are warm by then: a start takes longer than all of it."""
    pids = {worker.worker: worker.pid for worker in client.workers()}
    owner = pids[client.jobs()[job.id]["worker"]]
    made = client.redis.xlen(keys.stream(job.id))
    assert 0 < made < LONG, f"{made} tokens are there: it is not in the middle"
    return owner


def patient_client(url: str, patience: float) -> Client:
    return Client(settings=Settings(url=url, patience=patience))


def processes_with(text: str) -> list[int]:
    """Processes whose command line holds `text`, this one left out."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = (line.strip().partition(" ") for line in listed.splitlines())
    return [int(pid) for pid, _, args in lines if text in args and int(pid) != os.getpid()]


class Proxy:
    """An address on loopback that hands connections on to the port `target`, which may change; with `tls`, it takes
    them encrypted."""

    def __init__(self, target: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.target, self._context = target, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'rediss' if tls else 'redis'}://127.0.0.1:{self.port}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def url_of(self, broker: FragileBroker) -> str:
        """The broker's URL through here, with its login."""
        return self.url.replace("127.0.0.1", broker.url.partition("://")[2].rpartition(":")[0])

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError), plain:
            client = plain if self._context is None else self._context.wrap_socket(plain, server_side=True)
            backend = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=_pump, args=(backend, client), daemon=True).start()
            _pump(client, backend)

    def close(self) -> None:
        # A thread that waits in accept() would take one more connection.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def logged(log: Path) -> list[dict[str, Any]]:
    """What a worker has logged as JSON; a whole line that is none fails the test. The last may be on its way."""
    whole, _, _ = log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
