"""`stoker up`: everything starts with one command, works from another shell, and is gone afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stoker import Client
from stoker.contract.presence import node_of
from stoker.settings import Settings
from tests import endless
from tests.conftest import EMBED_MODEL, alive, wait_until
from tests.integration.machinery import endless_in, processes_with

pytestmark = pytest.mark.integration

STOKER = str(Path(sys.executable).parent / "stoker")


class Up:
    """A `stoker up` of its own home, started as a user would."""

    def __init__(self, home: Path, *options: str, hang_up: Any = signal.SIG_DFL, **env: str) -> None:
        """`hang_up`: what a terminal that closes does to it; `nohup` ignores it."""
        earlier = len(list(home.parent.glob("up*.log")))
        self.output = home.parent / (f"up-{earlier}.log" if earlier else "up.log")
        self.home = home
        home.mkdir(exist_ok=True)
        self.env: Mapping[str, str] = {**os.environ, "STOKER_HOME": str(home), **env}
        self.process = subprocess.Popen(
            [STOKER, "up", *options],
            env=self.env,
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job ignores Ctrl-C, and its children would too.
            preexec_fn=lambda: (
                signal.signal(signal.SIGINT, signal.default_int_handler),
                signal.signal(signal.SIGHUP, hang_up),
            ),
        )

    def wait_until_warm(self) -> None:
        wait_until(lambda: "Ctrl-C ends" in self.output.read_text() or self.process.poll() is not None, "warm", 60)
        assert self.process.poll() is None, self.output.read_text()

    def stoker(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([STOKER, *arguments], env=self.env, capture_output=True, text=True, timeout=60)

    def processes(self) -> list[int]:
        """Broker and worker, with their guards."""
        status = json.loads(self.stoker("status", "--json").stdout)
        worker = [status[0]["pid"], *processes_with(f"--hostname={status[0]['worker'].partition('/')[0]}")]
        broker = processes_with(str(self.home / "broker"))
        host = self.url.rpartition("@")[2].removesuffix("/0")
        return worker + broker + processes_with(f"valkey-server {host}")

    @property
    def url(self) -> str:
        return str(json.loads((self.home / "broker.json").read_text())["url"])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


@contextmanager
def one_up(home: Path, models: str) -> Iterator[Up]:
    running = Up(home, "--no-flower", "--no-gateway", STOKER_GRACE="5", STOKER_MODELS=models)
    try:
        running.wait_until_warm()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """For the tests of a worker that goes on. The last of them kills it."""
    folder = tmp_path_factory.mktemp("up")
    with one_up(folder / "home", f"{EMBED_MODEL},{endless_in(folder)}") as running:
        yield running


def test_commands_work_from_another_shell(up: Up) -> None:
    status = up.stoker("status")
    assert status.returncode == 0
    assert EMBED_MODEL in status.stdout
    assert endless.MODEL in status.stdout
    embedded = up.stoker("embed", "a warm model")
    assert embedded.returncode == 0
    assert "384 in all" in embedded.stdout
    generated = up.stoker("generate", "Once upon a time", "--max-tokens", "32")
    assert generated.returncode == 0
    assert len(generated.stdout) > 40


def _runs_of(home: Path) -> Path:
    """Two runs that ended a hundred days ago; the folder of the older one."""
    for number in range(2):
        folder = home / "runs" / f"run-{number}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"request": {"name": "style", "steps": 1}, "status": "done"}))
        then = time.time() - (101 - number) * 86400
        os.utime(folder / "run.json", (then, then))
    return home / "runs" / "run-0"


@pytest.mark.slow
def test_a_second_one_joins_the_first_says_so_and_ends_alone_while_nohup_keeps_the_first(tmp_path: Path) -> None:
    env = {"STOKER_GRACE": "5", "STOKER_MODELS": EMBED_MODEL}
    old = _runs_of(tmp_path / "home")
    first = Up(tmp_path / "home", "--no-flower", "--no-gateway", hang_up=signal.SIG_IGN, **env)
    second = None
    try:
        first.wait_until_warm()
        wait_until(lambda: not old.exists(), "the worker removes runs beyond what is kept")
        second = Up(tmp_path / "home", **env)
        second.wait_until_warm()
        said = second.output.read_text()
        assert f"of the `stoker up` that runs already, process {first.process.pid})" in said
        assert "Ctrl-C ends this worker alone" in said
        assert "flower" not in said.replace("--no-flower", ""), "the first one's shows its worker too"
        assert len(json.loads(first.stoker("status", "--json").stdout)) == 2
        for up in (first, second):
            os.killpg(up.process.pid, signal.SIGHUP)  # as the terminals close
        assert second.process.wait(60) == 0
        assert first.process.poll() is None
        assert len(json.loads(first.stoker("status", "--json").stdout)) == 1
        assert first.stoker("embed", "still here").returncode == 0
        second = Up(tmp_path / "home", **env)
        second.wait_until_warm()
        first.stop()
        assert second.process.wait(60) == 3
        assert f"(process {first.process.pid}) has ended, and its broker with it" in second.output.read_text()
    finally:
        for left in (second, first):
            if left is not None:
                left.stop()
    assert not processes_with(str(tmp_path / "home"))


def test_settings_find_the_broker_of_a_running_up(up: Up) -> None:
    assert Settings(home=up.home).address.shown.startswith("redis://:***@127.0.0.1:"), "with its password"


def test_a_worker_that_dies_is_started_again(up: Up) -> None:
    with Client(settings=Settings(home=up.home)) as client:
        (first,) = client.workers()
        os.kill(first.pid, signal.SIGKILL)

        def successor() -> bool:
            # Under the same name, so that Flower has one row for both.
            again = [worker for worker in client.workers() if worker.pid != first.pid]
            return [node_of(worker.worker) for worker in again] == [node_of(first.worker)]

        wait_until(successor, "another worker is warm", 60)
    assert up.stoker("embed", "still here").returncode == 0


def test_nothing_is_left_when_it_is_killed(up: Up) -> None:
    pids = up.processes()
    assert len(pids) >= 4
    up.process.kill()
    up.process.wait(10)
    wait_until(lambda: not any(map(alive, pids)), "no process is left", 30)


@pytest.mark.slow
def test_a_damaged_model_file_is_one_line_and_its_own_exit_code(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(40))
    running = Up(tmp_path / "home", "--no-flower", "--no-gateway", "--model", f"damaged={damaged}")
    assert running.process.wait(60) == 5
    output = running.output.read_text()
    assert "damaged.gguf" in output
    assert "Traceback" not in output
    assert not processes_with(str(tmp_path / "home"))


def test_a_broker_that_the_user_named_and_that_is_away_is_not_replaced(tmp_path: Path) -> None:
    running = Up(tmp_path / "home", STOKER_URL="redis://127.0.0.1:1/0")
    assert running.process.wait(60) == 3
    assert "which STOKER_URL names" in running.output.read_text()


def test_flower_and_the_gateway_serve_the_worker_which_goes_on_without_them_until_ctrl_c_ends_all(
    tmp_path: Path,
) -> None:
    running = Up(tmp_path / "home", STOKER_GRACE="5", STOKER_MODELS=EMBED_MODEL)
    try:
        running.wait_until_warm()
        line = next(line for line in running.output.read_text().splitlines() if line.startswith("flower"))
        url = line.split()[1]

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"{url}/healthcheck", timeout=2) as reply:
                    return bool(reply.status == 200)
            except OSError:
                return False

        wait_until(answers, "Flower answers", 30)
        gateway = next(line for line in running.output.read_text().splitlines() if line.startswith("gateway")).split()[
            1
        ]

        def listed() -> bool:
            try:
                with urllib.request.urlopen(f"{gateway}/models", timeout=2) as reply:
                    return EMBED_MODEL in reply.read().decode()
            except OSError:
                return False

        wait_until(listed, "the gateway answers", 30)
        for pid in processes_with(f"serve --port={gateway.rpartition(':')[2].removesuffix('/v1')}"):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "the gateway ended" in running.output.read_text(), "its end is reported")
        for pid in processes_with(f"--port={url.rpartition(':')[2]}"):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "Flower ended" in running.output.read_text(), "its end is reported")
        assert running.stoker("embed", "still here").returncode == 0
        logs = [running.output, *running.home.glob("logs/*")]
        assert {log.name for log in logs} >= {"up.log", "worker.log", "flower.log", "gateway.log", "broker.log"}
        said = "\n".join(log.read_text() for log in logs)
        assert "still here" not in said
        assert (running.home / "broker" / "password").read_text().strip() not in said
        # `up` itself shows Flower's, once, to the one who started it.
        assert said.count((running.home / "flower" / "password").read_text().strip()) == 1
        _ctrl_c_ends_all(running)
    finally:
        running.stop()


def _ctrl_c_ends_all(up: Up) -> None:
    pids, url = up.processes(), up.url
    assert len(pids) >= 4, "broker and worker, each with its guard"
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    wait_until(lambda: not any(map(alive, pids)), "no process is left")
    assert not (up.home / "broker.json").exists()
    gone = up.stoker("status", "--url", url)
    assert gone.returncode == 3
    assert "Traceback" not in gone.stderr
