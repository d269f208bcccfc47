"""A user's program, as type checkers see it. It is checked and never run: by mypy and pyright, in
`tests/stoker/test_typed_calls.py`. A line that is marked as wrong has to be an error to both."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing
from typing import assert_type

import numpy as np

from stoker import (
    AsyncClient,
    Client,
    GenerateResult,
    JobStatus,
    RerankResult,
    StokerError,
    StreamToken,
    TrainReport,
    TrainResult,
)
from stoker.broker.registry import AdapterEntry
from stoker.client import AdapterJob, EmbedJob, GenerateJob, RerankJob, TrainJob
from stoker.contract import AdapterResult
from stoker.contract.vectors import Int8Vectors
from stoker.testing import AsyncFakeClient, FakeClient


def blocking(client: Client) -> None:
    job = client.embed(["a"], model="m", normalize=True, dtype="int8", truncation="end", priority=1)
    assert_type(job, EmbedJob)
    assert_type(job.result(), np.ndarray)
    assert_type(job.encoded(timeout=1), np.ndarray | Int8Vectors)
    assert_type(job.status(), JobStatus)
    for vector in client.embed_many(("a" for _ in range(3)), batch=2, dimensions=64):
        assert_type(vector, np.ndarray)
    ranked = client.rerank("q", ["a"], normalize=False, truncate=True, prompt="judge")
    assert_type(ranked, RerankJob)
    assert_type(ranked.result(), RerankResult)
    generated = client.generate("x", max_tokens=16, stop="\n", logit_bias={3: 1.0}, json_schema={})
    assert_type(generated, GenerateJob)
    assert_type(generated.result(), GenerateResult)
    assert_type(generated.stream(), Generator[StreamToken, None, None])
    for token in generated.stream():
        assert_type(token, StreamToken)
    for answer in client.generate_many(["a", [1, 2], {"prompt": "b", "max_tokens": 3}], seed=1, in_flight=2, n=2):
        assert_type(answer, GenerateResult | StokerError)
    run = client.train("style", [{"text": "x"}], steps=3, targets=["q_proj"], schedule="cosine")
    assert_type(run, TrainJob)
    assert_type(run.result(), TrainResult)
    for report in run.progress():
        assert_type(report, TrainReport)
    assert_type(client.adapters.list(), list[AdapterEntry])
    loaded = client.adapters.load("style", "folder", promote=False, deadline=10.0)
    assert_type(loaded, AdapterJob)
    assert_type(loaded.result(), AdapterResult)


async def texts() -> AsyncIterator[str]:
    yield "a"


async def awaited(client: AsyncClient) -> None:
    assert_type(await (await client.embed(["a"], dtype="float16")).result(), np.ndarray)
    async for vector in client.embed_many(texts(), in_flight=2, truncate=True):
        assert_type(vector, np.ndarray)
    async for answer in client.generate_many(texts(), temperature=0.5):
        assert_type(answer, GenerateResult | StokerError)
    assert_type(await (await client.rerank("q", ["a"], deadline=3.0)).result(), RerankResult)
    job = await client.generate(messages=[{"role": "user", "content": "x"}], n=2)
    assert_type(await job.result(timeout=3), GenerateResult)
    assert_type(job.stream(), AsyncGenerator[StreamToken, None])
    async with aclosing(job.stream()) as stream:
        async for token in stream:
            assert_type(token, StreamToken)
    run = await client.train("style", "data.jsonl", learning_rate=1e-3)
    assert_type(await run.result(), TrainResult)
    async for report in run.progress():
        assert_type(report, TrainReport)
    assert_type(await (await client.adapters.load("style", "folder")).result(), AdapterResult)


async def doubled() -> None:
    double = FakeClient(models={"m": ["generate"]})
    double.script.generate("a b", times=None)
    double.script.generate(lambda request: request.prompt or "", error=None)
    double.script.embed([[1.0, 2.0]])
    double.script.rerank([0.5])
    double.script.rerank(lambda request: [0.0 for _ in request.texts])
    blocking(double)
    assert_type(double.sent.generate[0].max_tokens, int)
    await awaited(AsyncFakeClient())
    double.script.generate(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    double.generate("x", max_token=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def misspelt(client: Client) -> None:
    client.generate("x", max_token=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.embed(["x"], normalise=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.rerank("q", ["x"], dtype="int8")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.embed_many(["x"], bacth=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.generate_many(["x"], max_token=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.generate_many(["x"], messages=[])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.embed_chunks(["x"], dimension=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.train("x", [], step=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.adapters.load("x", ".", promot=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def mistyped(client: Client) -> None:
    client.generate("x", max_tokens="16")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.embed(["x"], dtype="int4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.generate_many([7])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    client.train("x", [], targets=[7])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


async def misspelt_awaited(client: AsyncClient) -> None:
    await client.generate("x", max_token=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await client.embed(["x"], normalise=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.embed_many(["x"], bacth=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await client.train("x", [], step=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await client.adapters.load("x", ".", promot=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
