"""Random mischief over real workers: every stream whole, once and right; nothing left behind. `make chaos`."""

from __future__ import annotations

import os
import random
import signal
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest

from stoker import Client, JobStatus
from stoker.local.stack import Stack
from tests.conftest import GENERATE_MODEL, keys_without_expiry, wait_until
from tests.integration.machinery import GOLDENS, FragileBroker, patient_client, processes_with, worker_on

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(300)]

#: A job outlives two owners at the most (`ledger.MAX_DEATHS` is three), so no more may be taken from it in one run.
DEADLY = 2
TURNS = 6


@pytest.mark.parametrize("seed", range(4))
def test_streams_are_whole_whatever_happens_to_workers_and_connections(
    fragile: FragileBroker, tmp_path: Path, seed: int
) -> None:
    chance, names = random.Random(seed), []
    with patient_client(fragile.url, 60) as client, ExitStack() as workers:
        stacks = [workers.enter_context(worker_on(fragile, tmp_path / f"worker-{number}")) for number in range(2)]
        jobs = [
            client.generate(golden["prompt"], model=GENERATE_MODEL, max_tokens=64, job_id=f"{golden['name']}-{copy}")
            for golden in GOLDENS
            for copy in range(2)
        ]
        heard: dict[str, list[int]] = {}
        readers = [Thread(target=_listen, args=(client, job.id, heard)) for job in jobs]
        for reader in readers:
            reader.start()
        deadly = 0
        for turn in range(TURNS):
            enough = 3 * (turn + 1)
            wait_until(lambda enough=enough: sum(map(len, heard.values())) > 20 * enough, "tokens come", 90)
            names += [stack.worker_name for stack in stacks]
            act = chance.choice(["kill", "freeze", "drain", "drop"] if deadly < DEADLY else ["drain", "drop"])
            deadly += act in ("kill", "freeze")
            print(f"seed {seed}, turn {turn}: {act}")
            _act(act, chance.choice(stacks), fragile, client)
        for reader in readers:
            reader.join(120)
        for job in jobs:
            golden = next(golden for golden in GOLDENS if job.id.rpartition("-")[0] == golden["name"])
            assert heard[job.id] == golden["token_ids"], job.id
            assert job.status() == JobStatus.DONE
            assert job.result(10).text == golden["text"]
        wait_until(lambda: client.redis.hlen("stoker:unacked") == 0, "nothing is left unacknowledged")
        assert not client.jobs()
        assert not client.dead()
        assert not keys_without_expiry(client.redis)
    assert not [pid for name in names for pid in processes_with(name)]


def _listen(client: Client, job_id: str, heard: dict[str, list[int]]) -> None:
    tokens = heard.setdefault(job_id, [])
    for token in client.job(job_id).stream(cancel_on_close=False):  # type: ignore[union-attr]
        assert token.index == len(tokens)
        tokens.append(token.token_id)


def _act(act: str, stack: Stack, fragile: FragileBroker, client: Client) -> None:
    if act == "drop":
        fragile.drop_connections()
        return
    pid = next(iter(worker.pid for worker in client.workers() if worker.worker == stack.worker_name), None)
    if pid is None:
        return
    if act == "freeze":
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: pid not in {worker.pid for worker in client.workers()}, "it is silent", 30)
        os.kill(pid, signal.SIGCONT)
        return
    os.kill(pid, signal.SIGKILL if act == "kill" else signal.SIGTERM)
    stack.replace_worker()
    stack.wait_until_warm()
