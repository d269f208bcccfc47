"""Training runs that move: another worker, with another disk, goes on where the first one left them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stoker import Client
from stoker.broker import keys, registry
from stoker.contract import bundle
from stoker.local.stack import Stack
from tests.chaos.fleet import GENERATE, make_models
from tests.conftest import stack_settings, wait_until
from tests.integration.machinery import FragileBroker, patient_client

pytestmark = pytest.mark.integration

STEPS = 60
OPTIONS = ["--rank", "4", "--batch-size", "2", "--max-length", "32", "--checkpoint-every", "5", "--dropout", "0.1",
           "--held-out", "0.25", "--eval-every", "7", "--seed", "3", "--steps", str(STEPS)]  # fmt: skip
#: What a report says of the machine, not of the run.
NOISE = ("tokens_per_second", "memory_bytes", "published")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return make_models(tmp_path)[0]


@contextmanager
def worker(broker: FragileBroker, home: Path, model: str, **overrides: Any) -> Iterator[Stack]:
    settings = stack_settings(home, url=broker.url, grace=1.0, models=(model,), **overrides)
    with Stack(settings, flower=False) as stack:
        yield stack


class Run:
    """A `stoker train` of its own process."""

    def __init__(self, client: Client, folder: Path, name: str) -> None:
        dataset = folder / "rows.jsonl"
        dataset.write_text("".join(json.dumps({"text": "ab " * (1 + n % 7)}) + "\n" for n in range(12)))
        command = [str(Path(sys.executable).parent / "stoker"), "train", name, "--dataset", str(dataset), "--json"]
        env = {**os.environ, "STOKER_URL": client.settings.address.url, "STOKER_HOME": str(folder / "client")}
        command += ["--model", GENERATE, *OPTIONS]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.id: str = wait_until(lambda: next(iter(client.jobs()), None), "it is sent")

    def finish(self) -> list[dict[str, Any]]:
        """What it printed of each step."""
        out, said = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, said
        lines = [json.loads(line) for line in out.splitlines()]
        return [{name: value for name, value in line.items() if name not in NOISE} for line in lines if "loss" in line]


def kept(client: Client, job_id: str) -> int:
    """Reports up to the checkpoint that the broker has."""
    raw = client.redis.hget(keys.checkpoint(job_id), "manifest")
    return json.loads(raw)["reports"] if raw else 0


def owner(client: Client, job_id: str) -> int:
    """The process that runs the job."""
    pids = {presence.worker: presence.pid for presence in client.workers()}
    found: int = wait_until(lambda: pids.get(client.jobs()[job_id].get("worker", "")), "a worker runs it")
    return found


def weights(client: Client, name: str) -> bytes:
    stored = client.redis.get(keys.artifact(GENERATE, name, 1))
    assert isinstance(stored, bytes)
    return bundle.unpack(stored, name)["adapter_model.safetensors"]


def losses(stack: Stack, run: Run) -> list[float]:
    """Those of the log in the run's folder."""
    lines = (stack.settings.runs / run.id / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def in_the_middle(client: Client, run: Run) -> None:
    assert 0 < wait_until(lambda: kept(client, run.id), "a checkpoint is in the store") < STEPS


@pytest.mark.timeout(240)
def test_a_run_whose_machine_is_gone_ends_on_another_as_if_nothing_had_happened(
    fragile: FragileBroker, tmp_path: Path, model: str
) -> None:
    with patient_client(fragile.url, 60) as client:
        with worker(fragile, tmp_path / "one", model) as first:
            first.wait_until_warm()
            moved = Run(client, tmp_path, "moved")
            pid = owner(client, moved.id)
            in_the_middle(client, moved)
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(tmp_path / "one")
        with worker(fragile, tmp_path / "two", model) as second:
            lines = moved.finish()
            log = (second.settings.logs / "worker.log").read_text()
            assert "goes on behind report" in log
            undisturbed = Run(client, tmp_path, "calm")
            calm = undisturbed.finish()
            assert [line["index"] for line in lines] == list(range(STEPS))
            assert lines == calm
            assert weights(client, "moved") == weights(client, "calm")
            assert not client.redis.exists(*(keys.checkpoint(run.id) for run in (moved, undisturbed)))
            assert losses(second, moved) == losses(second, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_worker_that_was_overtaken_leaves_nothing_of_a_run_behind(
    fragile: FragileBroker, tmp_path: Path, model: str
) -> None:
    """It wakes up while the next one trains, and makes its last steps too."""
    homes = [tmp_path / "one", tmp_path / "two"]
    with (
        patient_client(fragile.url, 60) as client,
        worker(fragile, homes[0], model) as first,
        worker(fragile, homes[1], model) as second,
    ):
        for stack in (first, second):
            stack.wait_until_warm()
        moved = Run(client, tmp_path, "moved")
        frozen = owner(client, moved.id)
        in_the_middle(client, moved)
        os.kill(frozen, signal.SIGSTOP)
        try:
            wait_until(lambda: owner(client, moved.id) != frozen, "it is another's")
        finally:
            os.kill(frozen, signal.SIGCONT)
        lines = moved.finish()
        wait_until(lambda: all(not w.lanes["train"][0] for w in client.workers()), "both have let go")
        raw: Any = client.redis.hgetall(keys.adapter(GENERATE, "moved"))
        entry = registry.parse(GENERATE, "moved", raw)
        names = {presence.pid: presence.worker for presence in client.workers()}
        assert list(entry.versions) == [1]
        assert entry.versions[1]["worker"] != names[frozen]
        assert not client.redis.exists(keys.checkpoint(moved.id))
        home = homes[0] if names[frozen] == first.worker_name else homes[1]
        assert not list((home / "adapters").glob("*/moved/*"))
        undisturbed = Run(client, tmp_path, "calm")
        assert undisturbed.finish() == lines
        assert weights(client, "moved") == weights(client, "calm")
