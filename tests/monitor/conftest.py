"""A monitor as it is run, with a broker of its own and no worker."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stoker import Client
from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.local.broker import EmbeddedBroker
from stoker.local.stack import Stack
from stoker.monitor.access import password
from stoker.settings import Settings
from tests.conftest import wait_until
from tests.monitor.test_overview import card

MODEL = "base"


@dataclass(frozen=True)
class Answer:
    status: int
    text: str
    #: By their names in lower case.
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


class Running:
    """A `stoker flower` of its own home."""

    def __init__(self, settings: Settings, *options: str) -> None:
        self.settings, self.log = settings, settings.home / "flower.log"
        command = [sys.executable, "-m", "stoker.cli", "flower", "--port=0", *options]
        env = {**os.environ, "STOKER_HOME": str(settings.home), "STOKER_URL": str(settings.url)}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said.startswith("flower"), self.log.read_text()
        self.url = self.said.split()[1]

    def ask(self, path: str, data: dict[str, str] | None = None, *, login: bool = True, **headers: str) -> Answer:
        """`headers`: with `_` for `-`."""
        body = None if data is None else urllib.parse.urlencode(data).encode()
        code = base64.b64encode(f"stoker:{password(self.settings)}".encode()).decode()
        sent = {"Authorization": f"Basic {code}"} if login else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, body, sent), timeout=10) as reply:
                return Answer(reply.status, reply.read().decode(errors="replace"), _lower(reply.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read().decode(errors="replace"), _lower(error.headers))

    def seen(self) -> Any:
        return self.ask("/stoker/data").json

    def state(self, job_id: str) -> str:
        """What Flower calls the job's state; "" for a job that it does not know yet."""
        answer = self.ask(f"/api/task/info/{job_id}")
        return str(answer.json["state"]) if answer.status == 200 else ""

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def monitor_of(stack: Stack, home: Path) -> Iterator[Running]:
    """A `stoker flower` that watches the stack and sees its worker."""
    running = Running(stack.settings.model_copy(update={"home": home}))
    try:
        wait_until(lambda: running.seen()["workers"], "the worker is seen")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A broker that knows a model which no worker serves just now."""
    home: Path = tmp_path_factory.mktemp("monitored")
    broker = EmbeddedBroker(Settings(home=home), port=0)
    try:
        settings = Settings(home=home, url=broker.start())
        client = connect(settings)
        shown = card(model=MODEL, kinds=("embed", "generate", "train", "adapters"), seen=time.time())
        client.hset(keys.MODELS, f"{MODEL}/1", shown.model_dump_json())
        client.close()
        yield settings
    finally:
        broker.stop()


@pytest.fixture(scope="session")
def running(monitored: Settings) -> Iterator[Running]:
    made = Running(monitored)
    try:
        wait_until(lambda: made.seen()["queues"], "the queues are seen")
        yield made
    finally:
        made.stop()


@pytest.fixture
def jobs(monitored: Settings) -> Iterator[Client]:
    with Client(settings=monitored) as client:
        yield client
