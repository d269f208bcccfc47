"""Bulk embedding against a client that is a double: order, what is in flight, what is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import anyio
import numpy as np
import pytest

from stoker.client._async import bulk as bulk_async
from stoker.client._async.bulk import embed_chunks as embed_chunks_async
from stoker.client._sync import bulk as bulk_sync
from stoker.client._sync.bulk import embed_chunks
from stoker.client.chunks import BATCH_CHARS, LONGEST_PAUSE, Chunk, Cutter, InFlightLimit, Plan, named
from stoker.contract import ModelCard, Presence
from stoker.contract.vectors import Encoded, VectorType, load, plain, quantize, save
from stoker.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobError,
    JobFailed,
    JobLost,
    QueueFull,
    StokerError,
    TextTooLong,
)


def vector(text: str) -> list[float]:
    return [float(part) for part in text.split()]


@dataclass
class FakeJob:
    client: FakeClient
    texts: list[str]
    failure: StokerError | None

    def encoded(self) -> Encoded:
        self.client.open.remove(self)
        if self.failure is not None:
            raise self.failure
        return np.array([vector(text) for text in self.texts], dtype=np.float32)

    def discard(self) -> None:
        self.client.discarded += 1

    def cancel(self) -> None:
        self.client.cancelled += 1


@dataclass
class FakeClient:
    """`failures`: what the next jobs end with, in the order they are sent."""

    failures: list[StokerError | None] = field(default_factory=list)
    refusals: list[StokerError | None] = field(default_factory=list)
    alive: int = 1
    open: list[FakeJob] = field(default_factory=list)
    sent: list[list[str]] = field(default_factory=list)
    most_open: int = 0
    discarded: int = 0
    cancelled: int = 0

    def embed(self, texts: list[str], *, model: str, **options: Any) -> FakeJob:
        if self.refusals and (refusal := self.refusals.pop(0)) is not None:
            raise refusal
        self.sent.append(texts)
        job = FakeJob(self, texts, self.failures.pop(0) if self.failures else None)
        self.open.append(job)
        self.most_open = max(self.most_open, len(self.open))
        return job

    def workers(self) -> list[Presence]:
        card = ModelCard(model="mini", architecture="x", kinds=("embed",), context=8, parameters=1)
        return [presence(card)] * self.alive


def presence(card: ModelCard) -> Presence:
    return Presence(
        worker="w", host="h", pid=1, device="cpu", started=0.0, time=0.0, models=(card,), adapters={}, lanes={},
        memory_bytes=0,
    )  # fmt: skip


class AwaitedJob:
    def __init__(self, job: FakeJob) -> None:
        self._job = job

    async def encoded(self) -> Encoded:
        await asyncio.sleep(0)
        return self._job.encoded()

    async def discard(self) -> None:
        self._job.discard()

    async def cancel(self) -> None:
        self._job.cancel()


class AwaitedClient:
    def __init__(self, inner: FakeClient) -> None:
        self._inner = inner

    async def embed(self, texts: list[str], **options: Any) -> AwaitedJob:
        return AwaitedJob(self._inner.embed(texts, **options))

    async def workers(self) -> list[Presence]:
        return self._inner.workers()


Run = Callable[..., Iterator[Any]]


def blocking(client: FakeClient, texts: Any, plan: Plan, stop_after: int | None = None) -> list[Any]:
    chunks = embed_chunks(client, texts, "mini", plan, {})  # type: ignore[arg-type]
    with closing(chunks):
        return list(islice(chunks, stop_after))


def awaited(client: FakeClient, texts: Any, plan: Plan, stop_after: int | None = None) -> list[Any]:
    async def collect() -> list[Any]:
        found: list[Any] = []
        async with aclosing(embed_chunks_async(AwaitedClient(client), texts, "mini", plan, {})) as chunks:  # type: ignore[arg-type]
            async for chunk in chunks:
                found.append(chunk)
                if len(found) == stop_after:
                    break
        return found

    return asyncio.run(collect())


@pytest.fixture(params=[blocking, awaited], ids=["blocking", "async"])
def run(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    return request.param  # type: ignore[no-any-return]


TEXTS = [f"{number} {number * 2}" for number in range(100)]


def test_vectors_come_in_order_and_none_is_left_in_the_broker(run: Callable[..., list[Any]]) -> None:
    client = FakeClient()
    chunks = run(client, TEXTS, Plan(7, 3, 3))
    assert np.array_equal(np.concatenate(chunks), np.array([vector(text) for text in TEXTS], dtype=np.float32))
    assert [len(texts) for texts in client.sent] == [7] * 14 + [2]
    assert client.most_open == 3
    assert client.discarded == 15
    assert client.cancelled == 0


def test_texts_are_taken_only_as_they_are_needed(run: Callable[..., list[Any]]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"{taken} 0"

    client = FakeClient()
    assert len(run(client, endless(), Plan(4, 2, 1), stop_after=5)) == 5
    assert taken <= 4 * 7 + 1
    assert client.cancelled == len(client.open) <= 2, "what is under way is cancelled"


def test_what_failed_is_sent_again_in_its_place(run: Callable[..., list[Any]]) -> None:
    client = FakeClient(failures=[None, JobFailed("x"), JobLost("y"), None, JobFailed("z")])
    chunks = run(client, TEXTS[:20], Plan(4, 2, 3))
    assert np.concatenate(chunks)[:, 0].tolist() == list(range(20))
    assert len(client.sent) == 5 + 3


@pytest.mark.parametrize("error", [JobCancelled, JobDead, DeadlineExceeded])
def test_what_was_meant_or_is_deadly_is_not_sent_again(run: Callable[..., list[Any]], error: type[JobError]) -> None:
    client = FakeClient(failures=[error("x")])
    with pytest.raises(error):
        run(client, TEXTS, Plan(10, 2, 3))
    assert len(client.sent) == 2


def test_a_job_that_keeps_failing_ends_the_run(run: Callable[..., list[Any]]) -> None:
    client = FakeClient(failures=[JobFailed("out of memory")] * 3)
    with pytest.raises(JobFailed, match="out of memory"):
        run(client, TEXTS[:5], Plan(5, 1, 3))
    assert len(client.sent) == 3


def test_a_text_that_is_wrong_is_named_by_its_place_among_all(run: Callable[..., list[Any]]) -> None:
    late = FakeClient(failures=[None, None, TextTooLong("texts.3: 300 tokens given")])
    with pytest.raises(TextTooLong, match=r"^texts\.23: 300 tokens"):
        run(late, TEXTS, Plan(10, 1, 3))
    early = FakeClient(refusals=[InvalidRequest("texts.0: an empty text given")])
    with pytest.raises(InvalidRequest, match=r"^texts\.0: an empty"):
        run(early, TEXTS, Plan(10, 1, 3))
    third = FakeClient(refusals=[None, None, InvalidRequest("texts.4: an empty text given")])
    with pytest.raises(InvalidRequest, match=r"^texts\.24: an empty"):
        run(third, TEXTS, Plan(10, 1, 3))
    with pytest.raises(InvalidRequest, match=r"^texts\.2: a int given"):
        run(FakeClient(), ["1", "2", 3], Plan(10, 1, 3))
    with pytest.raises(InvalidRequest, match="one text given"):
        run(FakeClient(), "1", Plan(10, 1, 3))


def test_a_full_queue_is_waited_for(run: Callable[..., list[Any]]) -> None:
    client = FakeClient(refusals=[QueueFull("full", depth=1, limit=1, wait=0.01)] * 2)
    assert len(np.concatenate(run(client, TEXTS, Plan(50, 2, 1)))) == 100


def test_a_queue_that_says_that_it_takes_long_is_asked_again_soon_all_the_same(
    run: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = list[float]()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(bulk_async, "sleep", pause)
    monkeypatch.setattr(bulk_sync, "sleep", pauses.append)
    client = FakeClient(refusals=[QueueFull("full", depth=1, limit=1, wait=wait) for wait in (3600.0, 0.5)])
    assert len(np.concatenate(run(client, TEXTS, Plan(50, 2, 1)))) == 100
    assert pauses == [LONGEST_PAUSE, 0.5]


def test_a_queue_that_is_full_of_what_the_call_itself_has_made_is_emptied_by_it(
    run: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors take up room until they are fetched: to wait for room would be to wait for oneself."""

    class NarrowClient(FakeClient):
        def embed(self, texts: list[str], *, model: str, **options: Any) -> FakeJob:
            if len(self.open) == 2:
                raise QueueFull("vectors that wait to be fetched", depth=2, limit=2, wait=5.0)
            return super().embed(texts, model=model, **options)

    _refuse_to_wait(monkeypatch)
    client = NarrowClient()
    found = np.concatenate(run(client, TEXTS, Plan(10, 4, 1)))
    assert found.tolist() == [vector(text) for text in TEXTS]
    assert (client.most_open, client.discarded, client.cancelled) == (2, 10, 0)


def _refuse_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(seconds: float) -> None:
        raise AssertionError("it waits for room")

    monkeypatch.setattr(bulk_async, "sleep", refused)
    monkeypatch.setattr(bulk_sync, "sleep", refused)


def test_a_part_that_failed_and_finds_the_queue_full_of_what_later_ones_have_made_is_sent_again(
    run: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NarrowClient(FakeClient):
        def embed(self, texts: list[str], *, model: str, **options: Any) -> FakeJob:
            if len(self.sent) >= 3 and len(self.open) >= 2:
                raise QueueFull("vectors that wait to be fetched", depth=2, limit=2, wait=5.0)
            return super().embed(texts, model=model, **options)

    _refuse_to_wait(monkeypatch)
    client = NarrowClient(failures=[JobFailed("no"), JobFailed("no"), None])
    found = np.concatenate(run(client, TEXTS, Plan(10, 3, 2)))
    assert found.tolist() == [vector(text) for text in TEXTS]
    assert (len(client.sent), client.discarded, client.cancelled) == (12, 10, 0)


def test_a_bulk_call_that_is_cancelled_cancels_all_its_jobs() -> None:
    client = FakeClient()

    class Slow(AwaitedJob):
        async def encoded(self) -> Encoded:
            await asyncio.Event().wait()
            raise AssertionError

        async def cancel(self) -> None:
            await asyncio.sleep(0)
            await super().cancel()

    class SlowClient(AwaitedClient):
        async def embed(self, texts: list[str], **options: Any) -> AwaitedJob:
            return Slow(client.embed(texts, **options))

    async def leave() -> None:
        with anyio.move_on_after(60) as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            async with aclosing(embed_chunks_async(SlowClient(client), TEXTS, "mini", Plan(10, 3, 1), {})) as chunks:  # type: ignore[arg-type]
                await anext(chunks)

    asyncio.run(leave())
    assert client.cancelled == len(client.sent) == 3


def test_an_async_iterable_of_texts_will_do() -> None:
    async def texts() -> AsyncIterator[str]:
        for text in TEXTS:
            yield text

    assert len(np.concatenate(awaited(FakeClient(), texts(), Plan(8, 2, 1)))) == 100


def test_long_texts_make_smaller_jobs(run: Callable[..., list[Any]]) -> None:
    client = FakeClient()
    run(client, ["1" + " " * (BATCH_CHARS // 3)] * 7, Plan(100, 2, 1))
    assert [len(texts) for texts in client.sent] == [2, 2, 2, 1]


def test_more_workers_mean_more_jobs_in_flight() -> None:
    limit = InFlightLimit(Plan(1, None, 1), "mini")
    assert limit.stale
    client = FakeClient(alive=3)
    limit.count(client.workers())
    assert limit.limit == 12
    other = ModelCard(model="maxi", architecture="x", kinds=("embed",), context=8, parameters=1)
    limit.count([*client.workers(), presence(other)])
    assert limit.limit == 12, "one that serves another model is no help"
    limit.count([])
    assert (limit.limit, limit.stale) == (4, False)


@pytest.mark.parametrize("options", [(0, None, 1), (5000, None, 1), (1, 0, 1), (1, None, 0)])
def test_a_plan_that_cannot_work_is_refused(options: tuple[int, int | None, int]) -> None:
    with pytest.raises(InvalidRequest, match="given; 1 to"):
        Plan(*options)


def test_int8_is_off_by_half_a_step_at_the_most() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 384)).astype(np.float32)
    vectors[7] = 0
    small = load(save(vectors, "int8"))
    assert not isinstance(small, np.ndarray)
    assert (small.codes.dtype, small.scales.dtype) == (np.dtype(np.int8), np.dtype(np.float32))
    error = np.abs(small.to_float32() - vectors)
    assert (error <= small.scales[:, None] * 0.5001).all()
    assert (small.scales == np.abs(vectors).max(axis=1) / np.float32(127)).all()
    cosine = (small.to_float32()[0] @ vectors[0]) / np.linalg.norm(small.to_float32()[0]) / np.linalg.norm(vectors[0])
    assert cosine > 0.9999
    assert len(save(vectors, "int8")) < 0.3 * len(save(vectors, "float32"))
    assert np.array_equal(plain(quantize(vectors)), small.to_float32())


def test_float16_and_float32_come_as_they_are() -> None:
    vectors = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    dtypes: tuple[VectorType, ...] = ("float32", "float16")
    for dtype in dtypes:
        found = load(save(vectors, dtype))
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, vectors.astype(dtype))


def test_a_chunk_begins_where_the_one_before_it_ended_also_if_that_was_cut_by_its_characters() -> None:
    """Else an error names another text."""
    cutter = Cutter(batch=4)
    texts = ["x" * 300_000, "y" * 300_000, *"zw", *"abcdef"]
    chunks = [*(chunk for text in texts for chunk in cutter.add(text)), *cutter.rest()]
    assert [(chunk.start, len(chunk.texts)) for chunk in chunks] == [(0, 1), (1, 4), (5, 4), (9, 1)]
    assert [text for chunk in chunks for text in chunk.texts] == texts
    assert not list(cutter.add("g"))
    with pytest.raises(InvalidRequest, match=r"^texts\.11: a int given"):
        list(cutter.add(7))


def test_an_error_gets_the_index_of_its_own_text_and_what_it_quotes_stays() -> None:
    found = named(InvalidRequest("texts.2: 'see texts.1' given; texts.3 is well."), Chunk(10, ["a"]))
    assert str(found) == "texts.12: 'see texts.1' given; texts.3 is well."


def test_a_job_has_as_many_texts_and_characters_as_are_allowed_and_not_one_more() -> None:
    half = "x" * (BATCH_CHARS // 2)
    cutter = Cutter(batch=4)
    cut = [chunk for text in (half, half, "y", *"abcd", "z") for chunk in cutter.add(text)] + list(cutter.rest())
    assert [chunk.texts for chunk in cut] == [[half, half], ["y", "a", "b", "c"], ["d", "z"]]
    assert [chunk.start for chunk in cut] == [0, 2, 6]
