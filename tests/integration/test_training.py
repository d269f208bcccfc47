"""Training through a real worker that stops, dies and comes back."""

from __future__ import annotations

import json
import os
import signal
from importlib import resources

import pytest

from stoker import Client, JobStatus
from stoker.client.options import TrainOptions
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import GENERATE_MODEL

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack(real_stack: Stack) -> Stack:
    return real_stack


#: A second or two of them.
STEPS = 250
ROWS = [{"prompt": f"Q: {word}?\nA:", "completion": " Aye, stoker!"} for word in ("coal", "steam", "iron", "water")]


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
        own_stack.replace_worker()
        own_stack.wait_until_warm()
        reported += reports
        result = run.result(60)
        assert [report.index for report in reported] == list(range(STEPS))
        assert (result.steps, result.version) == (STEPS, 1)
        calm = client.train("calm", ROWS, model=endless.MODEL, **options)
        assert [report.loss for report in calm.progress(timeout=120)] == [report.loss for report in reported]
        text, calmly = (
            client.generate("Q: fire?\nA:", model=endless.MODEL, adapter=adapter, max_tokens=6).result(60).text
            for adapter in ("resumed", "calm")
        )
        assert text == calmly
    folder = own_stack.settings.home / "runs/resumed"
    log = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == [report.loss for report in reported]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_run_learns_a_style_that_it_shows_on_questions_it_never_saw(client: Client, dora: bool) -> None:
    """The shipped task. The bare model's loss on the answers held out is above 3 nats, and it never answers so."""
    dataset = resources.files("stoker.data").joinpath("house_style.jsonl")
    with resources.as_file(dataset) as path:
        run = client.train(
            f"learned-{dora}".lower(), path, model=GENERATE_MODEL, steps=32, batch_size=2, dora=dora,
            max_length=64, learning_rate=2e-3, schedule="cosine", warmup_steps=3, held_out=0.125, eval_every=8,
        )  # fmt: skip
    reports = list(run.progress(timeout=300))
    result = run.result(60)
    assert reports[0].loss > 3.0
    assert result.held_out_loss is not None
    assert result.held_out_loss < 1.8
    for question in ("Q: Where do bees live?\nA:", "Q: How deep is a lake?\nA:"):
        bare, styled = (
            client.generate(question, model=GENERATE_MODEL, adapter=adapter, max_tokens=40).result(120).text
            for adapter in (None, result.adapter)
        )
        assert styled.startswith(" Aye, stoker!")
        assert "Keep the fire hot!" in styled
        assert "Aye, stoker!" not in bare
