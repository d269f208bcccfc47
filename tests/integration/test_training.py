"""Training through a real worker that stops, dies and comes back."""

from __future__ import annotations

import json
import os
import signal

import pytest

from stoker import Client
from stoker.local.stack import Stack
from tests.conftest import GENERATE_MODEL

pytestmark = pytest.mark.integration

ROWS = [{"prompt": f"Q: {word}?\nA:", "completion": " Aye, stoker!"} for word in ("coal", "steam", "iron", "water")]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_run_whose_worker_goes_away_goes_on_in_the_next_and_makes_the_same(own_stack: Stack, how: int) -> None:
    options = {"steps": 8, "batch_size": 2, "max_length": 32, "checkpoint_every": 2, "learning_rate": 2e-3}
    with Client(settings=own_stack.settings) as client:
        run = client.train("resumed", ROWS, model=GENERATE_MODEL, job_id="resumed", **options)
        reports = run.progress(timeout=120)
        told = [next(reports) for _ in range(3)]
        (worker,) = client.workers()
        os.kill(worker.pid, how)
        own_stack.replace_worker()
        own_stack.wait_until_warm()
        told += reports
        result = run.result(60)
        assert [report.index for report in told] == list(range(8))
        assert (result.steps, result.version) == (8, 1)
        calm = client.train("calm", ROWS, model=GENERATE_MODEL, **options)
        assert [report.loss for report in calm.progress(timeout=120)] == [report.loss for report in told]
        text = client.generate("Q: fire?\nA:", model=GENERATE_MODEL, adapter="resumed", max_tokens=6).result(60).text
        assert (
            text == client.generate("Q: fire?\nA:", model=GENERATE_MODEL, adapter="calm", max_tokens=6).result(60).text
        )
    folder = own_stack.settings.home / "runs/resumed"
    log = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == [report.loss for report in told]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
