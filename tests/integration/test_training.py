"""Training through a real worker: adapters that serve at once, and a worker that stops, dies and comes
back."""

from __future__ import annotations

import json
import os
import signal

import pytest

from stoker import Client, JobStatus
from stoker.client.options import TrainOptions
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import replace_worker, wait_until

pytestmark = pytest.mark.integration


#: A second or two of them.
STEPS = 120
QUESTION = "Q: fire?\nA:"
ROWS = [{"prompt": f"Q: {word}?\nA:", "completion": " Aye, stoker!"} for word in ("coal", "steam", "iron", "water")]


def test_a_trained_adapter_serves_at_once_along_with_the_bare_base(client: Client) -> None:
    options: TrainOptions = {"steps": 8, "batch_size": 4, "learning_rate": 4e-2, "max_length": 32}
    before = client.generate(QUESTION, model=endless.MODEL, max_tokens=6).result(60).token_ids
    run = client.train("aye-first", ROWS, model=endless.MODEL, **options)
    reports = list(run.progress(timeout=60))
    result = run.result(60)

    assert [report.step for report in reports] == list(range(1, 9))
    assert reports[-1].loss < reports[0].loss
    assert (result.adapter, result.version, result.steps) == ("aye-first", 1, 8)
    jobs = [client.generate(QUESTION, model=endless.MODEL, max_tokens=6, adapter=name) for name in (None, "aye-first")]
    bare, adapted = (job.result(60).token_ids for job in jobs)
    assert bare == before, "training must not change the base"
    assert adapted != bare
    wait_until(lambda: "aye-first@1" in client.workers()[0].adapters[endless.MODEL], "the worker reports its adapter")


def test_the_same_run_twice_makes_the_same_losses_and_a_new_version(client: Client) -> None:
    rows = [{"text": "Steam lifts the piston."}, {"text": "Coal feeds the fire."}]
    runs = [
        client.train("twice", rows, model=endless.MODEL, steps=3, batch_size=2, max_length=32, seed=5) for _ in range(2)
    ]
    losses = [[report.loss for report in run.progress(timeout=60)] for run in runs]
    assert losses[0] == losses[1]
    assert [run.result(60).version for run in runs] == [1, 2]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGINT, id="stopped", marks=pytest.mark.slow), pytest.param(signal.SIGKILL, id="killed")],
)
def test_a_run_whose_worker_goes_away_goes_on_in_the_next_and_makes_the_same(own_stack: Stack, how: int) -> None:
    options: TrainOptions = {
        "steps": STEPS,
        "batch_size": 1,
        "max_length": 32,
        "checkpoint_every": 10,
        "learning_rate": 2e-3,
    }
    with Client(settings=own_stack.settings) as client:
        (worker,) = client.workers()
        run = client.train("resumed", ROWS, model=endless.MODEL, job_id="resumed", **options)
        reports = run.progress(timeout=120)
        reported = [next(reports) for _ in range(13)]
        assert run.status() == JobStatus.RUNNING, "it is in the middle"
        os.kill(worker.pid, how)
        replace_worker(own_stack)
        own_stack.wait_until_warm()
        reported += reports
        result = run.result(60)
        assert [report.index for report in reported] == list(range(STEPS))
        assert (result.steps, result.version) == (STEPS, 1)
        calm = client.train("calm", ROWS, model=endless.MODEL, **options)
        assert [report.loss for report in calm.progress(timeout=120)] == [report.loss for report in reported]
        text, calmly = (
            client.generate(QUESTION, model=endless.MODEL, adapter=adapter, max_tokens=6).result(60).text
            for adapter in ("resumed", "calm")
        )
        assert text == calmly
    folder = own_stack.settings.home / "runs/resumed"
    log = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == [report.loss for report in reported]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
