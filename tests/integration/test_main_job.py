"""The main job: through a real broker to a real worker with real weights, and back."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from stoker import Client, JobStatus
from stoker.errors import JobFailed
from stoker.local.stack import Stack
from tests.conftest import EMBED_MODEL, GENERATE_MODEL

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
    most, prompt = 24, SMOLLM2["prompts"][0]
    wanted = prompt["token_ids"][:most]
    job = client.generate(prompt["prompt"], model=GENERATE_MODEL, max_tokens=most)
    tokens = list(job.stream(timeout=60))
    result = job.result(60)
    assert [token.token_id for token in tokens] == wanted
    assert result.text == "".join(token.text for token in tokens)
    assert len(result.text) > most
    assert prompt["text"].startswith(result.text)
    assert result.token_ids == tuple(wanted)
    assert [token.index for token in tokens] == list(range(most))
    assert tokens[-1].finish_reason == result.finish_reason == "length"
    assert job.status() == JobStatus.DONE


def test_a_text_that_is_repeated_is_drafted_and_stays_the_same(client: Client) -> None:
    prompt = "one two three four five six seven eight one two three four five six seven eight one two three"
    plain, drafted = (
        client.generate(prompt, model=GENERATE_MODEL, max_tokens=16, lookup=lookup).result(60)
        for lookup in (None, True)
    )
    assert drafted.token_ids == plain.token_ids
    usage = drafted.usage
    assert usage.drafted_tokens is not None
    assert usage.accepted_tokens is not None
    assert usage.drafted_tokens >= max(1, usage.accepted_tokens)
    assert plain.usage.drafted_tokens is None


def test_requests_of_many_jobs_share_the_engine_and_keep_their_own_answers(client: Client) -> None:
    prompts = SMOLLM2["prompts"][:4]
    jobs = [client.generate(p["prompt"], model=GENERATE_MODEL, max_tokens=8) for p in prompts]
    for prompt, job in zip(prompts, jobs, strict=True):
        assert list(job.result(60).token_ids) == prompt["token_ids"][:8]


@pytest.mark.slow
def test_a_run_that_diverges_fails_and_says_what_to_do(client: Client) -> None:
    rows = [{"text": "Coal feeds the fire."}]
    run = client.train("x", rows, model=GENERATE_MODEL, steps=50, learning_rate=1.0, clip=1e6, alpha=4096.0, rank=1)
    with pytest.raises(JobFailed, match=r"diverged at step .* Lower learning_rate"):
        run.result(60)


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
