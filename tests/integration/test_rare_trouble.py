"""What happens once a year, with real processes: a fail-over, an upgrade, an engine that hangs, a full disk."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.errors import JobDead, UnknownModel
from stoker.local.process import Process
from stoker.local.stack import Stack
from stoker.settings import Settings
from tests.conftest import EMBED_MODEL, GENERATE_MODEL, stack_settings, wait_until
from tests.integration.machinery import GOLDENS, FragileBroker, Proxy, patient_client, worker_on

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

GOLDEN = GOLDENS[0]
CHECKOUT = Path(__file__).parents[2]


class StackOf(Stack):
    """A stack whose worker runs another app than `workers.celery.app`."""

    def __init__(self, settings: Settings, app: str) -> None:
        super().__init__(settings, flower=False)
        self._app = app

    def _spawn(self, name: str, command: list[str], grace: float) -> Process:
        return super()._spawn(name, [self._app if part == "workers.celery.app" else part for part in command], grace)


def test_a_stream_goes_on_when_a_replica_takes_the_brokers_place(tmp_path: Path) -> None:
    primary, replica = FragileBroker(tmp_path / "primary"), FragileBroker(tmp_path / "replica")
    proxy = Proxy(primary.port)
    spare = connect(Settings(url=replica.url))
    try:
        # The two have one password, as they must.
        for option in ("masterauth", "requirepass"):
            spare.config_set(option, urlsplit(primary.url).password)
        spare.replicaof("127.0.0.1", primary.port)
        with patient_client(proxy.url_of(primary), 60) as client:
            settings = stack_settings(tmp_path / "worker", url=proxy.url_of(primary))
            with Stack(settings, flower=False) as stack:
                pid = stack.wait_until_warm().pid
                job = client.generate(GOLDEN["prompt"], model=GENERATE_MODEL, max_tokens=64)
                stream = job.stream(timeout=60)
                heard = [next(stream) for _ in range(3)]
                # Replication is behind by what is under way: the promise holds for what the replica has.
                # WAIT speaks of its own connection's writes, so one goes before it on the same connection.
                both = client.redis.pipeline(transaction=False)
                both.set("replicated-up-to", 1)
                both.execute_command("WAIT", 1, 20_000)
                assert both.execute() == [True, 1]
                primary.kill()
                spare.replicaof("NO", "ONE")
                proxy.target = replica.port
                heard += stream
                assert [token.token_id for token in heard] == GOLDEN["token_ids"]
                assert job.result(60).text == GOLDEN["text"]
                assert client.workers()[0].pid == pid
                wait_until(lambda: client.redis.hlen(keys.UNACKED) == 0, "nothing is left unacknowledged")
    finally:
        spare.close()
        proxy.close()
        primary.close()
        replica.close()


def next_release(folder: Path) -> Path:
    """A copy of this checkout that speaks the next version of the contract."""
    for name in ("stoker", "workers", "tasks", "engine", "kernels"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    codec = folder / "stoker/contract/codec.py"
    source = codec.read_text()
    assert "\nCONTRACT = 1\n" in source
    codec.write_text(source.replace("\nCONTRACT = 1\n", "\nCONTRACT = 2\n"))
    return folder


def test_two_generations_share_a_broker_and_each_serves_its_own_clients(fragile: FragileBroker, tmp_path: Path) -> None:
    release = next_release(tmp_path / "release")

    def next_client(*arguments: str) -> Any:
        command = [sys.executable, "-c", "from stoker.cli import main; main()", *arguments, "--url", fragile.url]
        done = subprocess.run(command, cwd=release, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    settings = stack_settings(tmp_path / "new", url=fragile.url, models=(EMBED_MODEL,))
    old = Stack(settings.model_copy(update={"home": tmp_path / "old"}), flower=False)
    with patient_client(fragile.url, 30) as client, old, chdir(release), Stack(settings, flower=False) as new:
        old.wait_until_warm()
        new.wait_until_warm()
        speaks = {worker.worker: {card.contract for card in worker.models} for worker in client.workers()}
        assert speaks == {old.worker_name: {1}, new.worker_name: {2}}
        assert client.embed(["one", "two"], model=EMBED_MODEL).result(30).shape == (2, 384)
        assert [len(vector) for vector in next_client("embed", "one", "two", "--json")] == [384, 384]
        # The upgrade: the old generation drains, the new one stays.
        old.stop()
        wait_until(lambda: len(client.workers()) == 1, "the old worker has left")
        with patient_client(fragile.url, 30) as late, pytest.raises(UnknownModel, match=r"version 2 .* version 1"):
            late.embed(["three"], model=EMBED_MODEL)
        assert len(next_client("embed", "three", "--json")) == 1


def test_an_engine_that_hangs_ends_its_process_and_the_job_runs_in_the_next(
    fragile: FragileBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "hang"
    flag.touch()
    monkeypatch.setenv("HANG_WHILE", str(flag))
    settings = stack_settings(tmp_path / "worker", url=fragile.url, models=(EMBED_MODEL,), step_limit=2.0)
    stack = StackOf(settings, "tests.integration.apps.hanging")
    with patient_client(fragile.url, 60) as client, stack:
        stack.wait_until_warm()
        job = client.embed(["hanging"], model=EMBED_MODEL)
        worker = stack.worker
        assert worker is not None
        wait_until(lambda: worker.returncode is not None, "the watchdog ends the process", 60)
        assert worker.returncode == 70
        assert "a step of the engine took longer than 2 s" in worker.output()
        trouble = client.redis.hget(keys.job(job.id), Field.TROUBLE)
        assert isinstance(trouble, bytes)
        assert b"longer than 2 s" in trouble
        flag.unlink()
        stack.start_worker()
        assert job.result(60).shape == (1, 384)


def test_a_full_disk_leaves_the_last_checkpoint_and_a_dead_letter_that_goes_on_from_it(
    fragile: FragileBroker, tmp_path: Path
) -> None:
    """The limit on the size of a file stands for the disk's: writing beyond it fails in the same place."""
    rows = [{"text": f"Coal number {number} feeds the fire."} for number in range(8)]
    options: dict[str, Any] = {"model": GENERATE_MODEL, "steps": 8, "max_length": 32, "checkpoint_every": 2}
    with patient_client(fragile.url, 60) as client, worker_on(fragile, tmp_path / "worker") as stack:
        run = client.train("filled", rows, job_id="filled", **options)
        folder = stack.settings.home / "runs/filled/checkpoints"
        wait_until(lambda: (folder / "step-00000002").is_dir(), "the first checkpoint is whole", 60)
        (pid,) = (worker.pid for worker in client.workers())
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
        with pytest.raises(JobDead, match=r"the disk of .* is full .*stoker jobs retry filled"):
            run.result(60)
        left = sorted(path.name for path in folder.iterdir())
        assert left
        assert all(name.startswith("step-") for name in left), "nothing half-written"
        assert client.embed(["still there"], model=EMBED_MODEL).result(30).shape == (1, 384)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        again = client.retry("filled")
        reports = list(again.progress(timeout=60))  # type: ignore[union-attr]
        assert [report.step for report in reports] == list(range(1, 9))
        calm = client.train("calm", rows, **options)
        assert [report.loss for report in calm.progress(timeout=60)] == [report.loss for report in reports]
