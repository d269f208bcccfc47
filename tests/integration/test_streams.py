"""Token streams: every token once, in order, for every reader at every time."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from threading import Thread

import pytest

from stoker import AsyncClient, Client, JobStatus
from stoker.contract import StreamToken
from stoker.errors import JobCancelled, JobTimeout
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import wait_until

pytestmark = pytest.mark.integration

PROMPT = "The furnace was"


def test_a_late_subscriber_gets_every_token(client: Client) -> None:
    job = client.generate(PROMPT, model=endless.MODEL, max_tokens=12)
    result = job.result(60)
    for _ in range(2):
        tokens = list(job.stream(timeout=10))
        assert [token.index for token in tokens] == list(range(12))
        assert "".join(token.text for token in tokens) == result.text


def test_subscribers_that_join_in_the_middle_see_the_same_stream(client: Client) -> None:
    job = client.generate(PROMPT, model=endless.MODEL, max_tokens=24)
    early = job.stream(timeout=60)
    heard: list[StreamToken] = [next(early) for _ in range(5)]
    found: dict[int, list[StreamToken]] = {}

    def listen(number: int) -> None:
        found[number] = list(client.job(job.id).stream(timeout=60))  # type: ignore[union-attr]

    threads = [Thread(target=listen, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    heard.extend(early)
    for thread in threads:
        thread.join(60)
    assert [token.index for token in heard] == list(range(24))
    assert all(found[number] == heard for number in range(3))


def test_leaving_a_stream_early_cancels_its_job(client: Client) -> None:
    job = client.generate(PROMPT, model=endless.MODEL, max_tokens=2000)
    stream = job.stream(timeout=60)
    next(stream)
    stream.close()
    with pytest.raises(JobCancelled):
        job.result(30)
    assert job.status() == JobStatus.CANCELLED


def test_a_stream_may_be_left_without_cancelling(client: Client) -> None:
    job = client.generate(PROMPT, model=endless.MODEL, max_tokens=16)
    stream = job.stream(timeout=60, cancel_on_close=False)
    next(stream)
    stream.close()
    assert job.result(60).usage.completion_tokens == 16


def test_a_cancelled_training_run_ends_and_frees_the_worker(client: Client) -> None:
    run = client.train("never", [{"text": "a b c d"}], model=endless.MODEL, steps=100_000, max_length=16)
    next(iter(run.progress(timeout=60)))
    run.cancel()
    with pytest.raises(JobCancelled):
        run.result(30)
    wait_until(lambda: client.workers()[0].lanes["train"][0] == 0, "the training lane is free again")


def test_a_job_cancelled_before_a_worker_takes_it_never_runs(client: Client) -> None:
    blocker = client.train("blocker", [{"text": "a b c d"}], model=endless.MODEL, steps=100_000, max_length=16)
    next(iter(blocker.progress(timeout=60)))
    waiting = client.train("waiting", [{"text": "a b c d"}], model=endless.MODEL, steps=1, max_length=16)
    assert waiting.status() == JobStatus.QUEUED
    waiting.cancel()
    blocker.cancel()
    with pytest.raises(JobCancelled):
        waiting.result(30)


def test_a_time_limit_ends_the_waiting_and_not_the_job(client: Client) -> None:
    job = client.generate(PROMPT, model=endless.MODEL, max_tokens=48)
    with pytest.raises(JobTimeout, match="It goes on"):
        # No machine makes 48 tokens in that time.
        job.result(0.001)
    assert job.result(60).usage.completion_tokens == 48


def test_the_asyncio_client_does_the_same(stack: Stack) -> None:
    async def session() -> None:
        async with AsyncClient(settings=stack.settings) as client:
            vectors, job = await asyncio.gather(_vectors(client), client.generate(PROMPT, max_tokens=10))
            tokens = [token async for token in job.stream(timeout=60)]
            result = await job.result(60)
            assert vectors.shape == (2, 384)
            assert "".join(token.text for token in tokens) == result.text
            assert await job.status() == JobStatus.DONE
            run = await client.train("async", [{"text": "a b c d"}], steps=2, max_length=16)
            assert [report.step async for report in run.progress(timeout=60)] == [1, 2]
            endless = await client.generate(PROMPT, max_tokens=2000)
            async with aclosing(endless.stream(timeout=60)) as stream:
                await anext(stream)
            with pytest.raises(JobCancelled):
                await endless.result(30)

    async def _vectors(client: AsyncClient):  # type: ignore[no-untyped-def]
        return await (await client.embed(["a warm model", "a cold start"])).result(60)

    asyncio.run(session())
