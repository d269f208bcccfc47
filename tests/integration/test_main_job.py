"""The main job: through a real broker to a real worker with real weights, and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stoker import Client, JobStatus
from stoker.client.options import TrainOptions
from stoker.local.stack import Stack
from tests.conftest import EMBED_MODEL, GENERATE_MODEL, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack(real_stack: Stack) -> Stack:
    return real_stack


GOLDENS = Path(__file__).parent.parent / "goldens"
MINILM = json.loads((GOLDENS / "minilm.json").read_text())
SMOLLM2 = json.loads((GOLDENS / "smollm2.json").read_text())


def test_vectors_equal_those_of_sentence_transformers(client: Client) -> None:
    golden = np.load(GOLDENS / "minilm.npz")
    texts = [text["text"] for text in MINILM["texts"]]
    vectors = client.embed(texts, model=EMBED_MODEL, truncate=True).result(60)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - golden["batch"]).max() < 1e-4
    alone = client.embed([texts[3]], model=EMBED_MODEL).result(60)
    assert np.abs(alone[0] - golden["alone"][3]).max() < 1e-4


def test_greedy_text_equals_that_of_transformers(client: Client) -> None:
    prompt = SMOLLM2["prompts"][0]
    job = client.generate(prompt["prompt"], model=GENERATE_MODEL, max_tokens=64)
    tokens = list(job.stream(timeout=60))
    result = job.result(60)
    assert [token.token_id for token in tokens] == prompt["token_ids"]
    assert result.text == prompt["text"] == "".join(token.text for token in tokens)
    assert result.token_ids == tuple(prompt["token_ids"])
    assert [token.index for token in tokens] == list(range(64))
    assert tokens[-1].finish_reason == result.finish_reason == "length"
    assert job.status() == JobStatus.DONE


def test_a_text_that_is_repeated_is_drafted_and_stays_the_same(client: Client) -> None:
    prompt = "one two three four five six seven eight one two three four five six seven eight one two three"
    plain, drafted = (
        client.generate(prompt, model=GENERATE_MODEL, max_tokens=32, lookup=lookup).result(60)
        for lookup in (None, True)
    )
    assert drafted.token_ids == plain.token_ids
    usage = drafted.usage
    assert usage.drafted_tokens is not None
    assert usage.accepted_tokens is not None
    assert usage.drafted_tokens >= max(1, usage.accepted_tokens)
    assert plain.usage.drafted_tokens is None


def test_a_trained_adapter_serves_at_once_along_with_the_bare_base(client: Client) -> None:
    rows = [{"prompt": f"Q: {word}?\nA:", "completion": " Aye, stoker!"} for word in ("coal", "steam", "iron", "water")]
    options: TrainOptions = {"steps": 8, "batch_size": 4, "learning_rate": 4e-3, "max_length": 32}
    question = "Q: fire?\nA:"
    before = client.generate(question, model=GENERATE_MODEL, max_tokens=6).result(60)
    run = client.train("aye-first", rows, model=GENERATE_MODEL, **options)
    reports = list(run.progress(timeout=60))
    result = run.result(60)

    assert [report.step for report in reports] == list(range(1, 9))
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert (result.adapter, result.version, result.steps) == ("aye-first", 1, 8)
    jobs = [
        client.generate(question, model=GENERATE_MODEL, max_tokens=6, adapter=adapter)
        for adapter in (None, "aye-first")
    ]
    bare, adapted = (job.result(60) for job in jobs)
    assert bare.text == before.text, "training must not change the base"
    assert adapted.text.startswith(" Aye, stoker!")
    wait_until(lambda: "aye-first@1" in client.workers()[0].adapters[GENERATE_MODEL], "the worker reports its adapter")


def test_the_same_run_twice_makes_the_same_losses_and_a_new_version(client: Client) -> None:
    rows = [{"text": "Steam lifts the piston."}, {"text": "Coal feeds the fire."}]
    runs = [
        client.train("twice", rows, model=GENERATE_MODEL, steps=3, batch_size=2, max_length=32, seed=5)
        for _ in range(2)
    ]
    losses = [[report.loss for report in run.progress(timeout=60)] for run in runs]
    assert losses[0] == losses[1]
    assert [run.result(60).version for run in runs] == [1, 2]


def test_requests_of_many_jobs_share_the_engine_and_keep_their_own_answers(client: Client) -> None:
    prompts = SMOLLM2["prompts"][:4]
    jobs = [client.generate(p["prompt"], model=GENERATE_MODEL, max_tokens=16) for p in prompts]
    for prompt, job in zip(prompts, jobs, strict=True):
        assert list(job.result(60).token_ids) == prompt["token_ids"][:16]


def test_a_run_that_diverges_fails_and_says_what_to_do(client: Client) -> None:
    rows = [{"text": "Coal feeds the fire."}]
    run = client.train("x", rows, model=GENERATE_MODEL, steps=50, learning_rate=1.0, clip=1e6, alpha=4096.0, rank=1)
    with pytest.raises(Exception, match=r"diverged at step .* Lower learning_rate"):
        run.result(60)
