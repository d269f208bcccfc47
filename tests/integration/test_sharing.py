"""Several training runs at once: those that fit share a worker, and what does not fit goes to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker import Client, TrainJob
from stoker.contract import Presence
from tests.chaos.fleet import GENERATE, make_models
from tests.conftest import wait_until
from tests.integration.machinery import FragileBroker, patient_client
from tests.integration.test_moving import worker

pytestmark = pytest.mark.integration

ROWS = [{"text": "ab " * (1 + number % 7)} for number in range(12)]
#: The worker's limit is 1 MB: a run of this rank keeps 4.6 MB between its turns, one of rank 4 a fiftieth of that.
LARGE, SMALL = 256, 4


def train(client: Client, name: str, rank: int, steps: int) -> TrainJob:
    return client.train(name, ROWS, model=GENERATE, rank=rank, steps=steps, batch_size=2, max_length=32)


def owner(client: Client, run: TrainJob) -> str:
    job = client.jobs().get(run.id)
    return "" if job is None else str(job.get("worker", ""))


def at(client: Client, name: str) -> Presence:
    return next(presence for presence in client.workers() if presence.worker == name)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_runs_share_a_worker_and_one_that_does_not_fit_is_left_to_the_next(
    fragile: FragileBroker, tmp_path: Path
) -> None:
    """It would wait for hours at a worker that only holds it, while another one is idle."""
    model, limits = make_models(tmp_path)[0], {"train_runs": 2, "train_memory": 1}
    with patient_client(fragile.url, 60) as client, worker(fragile, tmp_path / "one", model, **limits) as first:
        first.wait_until_warm()
        pair = [train(client, name, SMALL, steps=150) for name in ("one", "two")]
        published = [[report.published or 0.0 for report in run.progress(timeout=60)] for run in pair]
        assert max(times[0] for times in published) < min(times[-1] for times in published), "both ran at once"
        running = train(client, "running", LARGE, steps=100_000)
        full = wait_until(lambda: owner(client, running), "it runs")
        left = train(client, "left", LARGE, steps=20)
        wait_until(lambda: at(client, full).lanes["train"] == (1, 1), "the worker holds no more")
        assert "does not fit next to 1" in at(client, full).held_back["train"]
        assert owner(client, left) == ""
        with worker(fragile, tmp_path / "two", model, **limits):
            assert left.result(60).usage.worker not in ("", full)
        assert owner(client, running) == full
        running.cancel()
        wait_until(lambda: at(client, full).lanes["train"] == (0, 2), "it has room for two again")
        assert at(client, full).held_back == {}
