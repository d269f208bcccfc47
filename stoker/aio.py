"""The asyncio client: `Client`, with `await`. What each method means is said there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from stoker import client_core as core
from stoker import keys, ledger
from stoker.adapters import AsyncAdapters
from stoker.bulk.chunks import ATTEMPTS, BATCH_TEXTS, Plan
from stoker.bulk.many import embed_chunks_async
from stoker.client_core import Dataset, JobStatus, Outcome, Prompt
from stoker.connection import TROUBLE, Patience, connect_async, translated
from stoker.contract import (
    AdapterResult,
    EmbedReply,
    GenerateResult,
    ModelCard,
    Presence,
    Request,
    StreamToken,
    TrainReport,
    TrainResult,
)
from stoker.contract.vectors import Encoded, plain
from stoker.loading import own_patience
from stoker.settings import Settings, load_settings
from stoker.tail import PAGE, QUIET, Limit, Tail, channels, commands

R = TypeVar("R")
E = TypeVar("E", StreamToken, TrainReport)


class AsyncClient:
    """Enqueues jobs from one event loop; use it in `async with`, or `await close()`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        queue_wait: float | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or load_settings(url=url, client_key=key, queue_wait=queue_wait)
        self.redis = connect_async(self.settings)
        self.adapters = AsyncAdapters(self)
        self._choices = core.Choices()

    async def embed(
        self, texts: Sequence[str], *, model: str | None = None, job_id: str | None = None, **options: Any
    ) -> AsyncEmbedJob:
        request = core.embed_request(await self.choose_model(model, "embed"), texts, options)
        return AsyncEmbedJob(self, await self._submit(request, job_id))

    async def embed_many(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        model: str | None = None,
        batch: int = BATCH_TEXTS,
        in_flight: int | None = None,
        attempts: int = ATTEMPTS,
        **options: Any,
    ) -> AsyncGenerator[np.ndarray]:
        """As `Client.embed_many`; `texts` may be asynchronous too."""
        model = await self.choose_model(model, "embed")
        chunks = embed_chunks_async(self, texts, model, Plan(batch, in_flight, attempts), options)
        async with aclosing(chunks):
            async for chunk in chunks:
                for vector in plain(chunk):
                    yield vector

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        model: str | None = None,
        seed: int | None = None,
        job_id: str | None = None,
        **options: Any,
    ) -> AsyncGenerateJob:
        request = core.generate_request(await self.choose_model(model, "generate"), prompt, seed, options)
        return AsyncGenerateJob(self, await self._submit(request, job_id))

    async def train(
        self, name: str, dataset: Dataset, *, model: str | None = None, job_id: str | None = None, **options: Any
    ) -> AsyncTrainJob:
        job_id = core.checked_job_id(job_id)
        request = core.train_request(await self.choose_model(model, "train"), name, dataset, job_id, options)
        data = await asyncio.to_thread(core.read_dataset, dataset)
        return AsyncTrainJob(self, await self._submit(request, job_id, data))

    async def _load_adapter(
        self, name: str, data: bytes, model: str, promote: bool, job_id: str | None
    ) -> AsyncAdapterJob:
        job_id = core.checked_job_id(job_id)
        request = core.adapter_request(model, name, job_id, {"promote": promote})
        return AsyncAdapterJob(self, await self._submit(request, job_id, data))

    async def job(self, job_id: str) -> AsyncEmbedJob | AsyncGenerateJob | AsyncTrainJob | AsyncAdapterJob:
        with translated(self.settings, at=keys.job(job_id)):
            kind = await self.redis.hget(keys.job(job_id), "kind")
        if kind is None:
            raise core.lost(job_id)
        return _JOBS[core.known_kind(job_id, kind)](self, job_id)

    async def workers(self) -> list[Presence]:
        with translated(self.settings):
            names = await self.redis.zrangebyscore(keys.WORKERS, time.time() - keys.PRESENCE_TTL, "+inf")
            raw = await self.redis.mget([keys.worker(name.decode(errors="replace")) for name in names]) if names else []
        return core.parse_presences(raw)

    async def models(self) -> dict[str, ModelCard]:
        with translated(self.settings):
            return core.parse_cards(await self.redis.hgetall(keys.MODELS))

    async def choose_model(self, model: str | None, kind: str) -> str:
        chosen = self._choices.get(model, kind)
        if chosen is None:
            chosen = core.choose_model(model, kind, await self.models(), await self.workers())
        return self._choices.keep(model, kind, chosen)

    async def _submit(self, request: Request, job_id: str | None, data: bytes = b"") -> str:
        # A digest of half a gigabyte would hold up the loop.
        make = partial(core.Submission, self.settings, request, core.checked_job_id(job_id), data)
        submission = await asyncio.to_thread(make) if data else make()
        with translated(self.settings):
            if submission.in_parts and not await self.redis.exists(keys.job(submission.job_id)):
                for part in submission.uploads(self.redis):
                    await part
        while True:
            with translated(self.settings):
                reply = await submission.send(self.redis)
                for awaitable in submission.tidy(self.redis, reply):
                    await awaitable
                if reply[0] == b"known":
                    submission.check_known(await self.redis.hget(keys.job(submission.job_id), "kind"))
                pause = submission.pause(reply)
            if pause is None:
                return submission.job_id
            await asyncio.sleep(pause)

    async def close(self) -> None:
        await self.redis.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncJob(Generic[R]):
    """A job that was sent. It goes on whether or not anybody waits for it."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self._client, self.id = client, job_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    async def result(self, timeout: float | None = None) -> R:
        return await self._read(await self._outcome(timeout))

    async def _outcome(self, timeout: float | None) -> Any:
        found: list[Outcome] = []
        async for _ in self._watch(None, timeout, found):
            pass
        return found[0].unwrap(self.id)

    async def status(self) -> JobStatus:
        with translated(self._client.settings):
            record, owner = await commands(self._client.redis.pipeline(), self.id, None).execute()
        return core.status_of(record, owner, self.id)

    async def cancel(self) -> None:
        with translated(self._client.settings):
            queue = await self._client.redis.hget(keys.job(self.id), "queue")
            if queue is None:
                raise core.lost(self.id)
            await ledger.cancel(self._client.redis, self.id, queue.decode())

    async def _read(self, value: Any) -> R:
        raise NotImplementedError

    async def _entries(self, entry: type[E], timeout: float | None, cancel_on_close: bool) -> AsyncGenerator[E]:
        found: list[Outcome] = []
        try:
            async for item in self._watch(Tail(entry), timeout, found):
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            if cancel_on_close:
                await self.cancel()
            raise
        found[0].unwrap(self.id)

    async def _watch(self, tail: Tail[E] | None, timeout: float | None, found: list[Outcome]) -> AsyncGenerator[E]:
        """Yield the entries, put the outcome into `found` (an async generator cannot return one)."""
        limit, patience = Limit(self.id, timeout), Patience(self._client.settings)
        while not found:
            try:
                async with self._client.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(*channels(self.id, tail))
                    async for item in self._follow(pubsub, tail, limit, patience, found):
                        yield item
            except TROUBLE as error:
                await asyncio.sleep(limit.slice(patience.spend(error)))

    async def _follow(
        self, pubsub: Any, tail: Tail[E] | None, limit: Limit, patience: Patience, found: list[Outcome]
    ) -> AsyncGenerator[E]:
        while True:
            with own_patience():
                record, owner, *pages = await commands(self._client.redis.pipeline(), self.id, tail).execute()
            patience.renew()
            if tail is not None:
                for item in tail.replay(pages[0]):
                    yield item
                if len(pages[0]) == PAGE:
                    continue
            outcome = Outcome.parse(record)
            if outcome is not None:
                found.append(outcome)
                return
            if owner[0] is None:
                raise core.lost(self.id)
            async for item in self._listen(pubsub, tail, limit, found):
                yield item
            if found:
                return

    async def _listen(self, pubsub: Any, tail: Tail[E] | None, limit: Limit, found: list[Outcome]) -> AsyncGenerator[E]:
        quiet = time.monotonic() + QUIET
        while (left := quiet - time.monotonic()) > 0:
            message = await pubsub.get_message(timeout=limit.slice(left))
            if message is None:
                continue
            limit.restart()
            quiet = time.monotonic() + QUIET
            if tail is None or message["channel"] != keys.channel(self.id).encode():
                outcome = core.announced(message["data"]) if tail is None else None
                found += [outcome] if outcome is not None else []
                return
            entry, gap = tail.live(message["data"])
            if entry is not None:
                yield entry
            if gap:
                return


class AsyncEmbedJob(AsyncJob[np.ndarray]):
    async def encoded(self, timeout: float | None = None) -> Encoded:
        return await self._fetch(await self._outcome(timeout))

    async def discard(self) -> None:
        with translated(self._client.settings):
            await self._client.redis.unlink(keys.blob(keys.vectors(self.id)))

    async def _read(self, value: Any) -> np.ndarray:
        return plain(await self._fetch(value))

    async def _fetch(self, value: Any) -> Encoded:
        reply = core.result_as(EmbedReply, value)
        patience = Patience(self._client.settings)
        while True:
            try:
                with translated(self._client.settings, but=TROUBLE), own_patience():
                    return core.read_vectors(reply, await self._client.redis.get(keys.blob(reply.blob)))
            except TROUBLE as error:
                await asyncio.sleep(patience.spend(error))


class AsyncGenerateJob(AsyncJob[GenerateResult]):
    def stream(self, *, timeout: float | None = None, cancel_on_close: bool = True) -> AsyncIterator[StreamToken]:
        """As `GenerateJob.stream`. To cancel at once on leaving early, wrap it in `contextlib.aclosing`."""
        return self._entries(StreamToken, timeout, cancel_on_close)

    async def _read(self, value: Any) -> GenerateResult:
        return core.result_as(GenerateResult, value)


class AsyncTrainJob(AsyncJob[TrainResult]):
    def progress(self, *, timeout: float | None = None, cancel_on_close: bool = False) -> AsyncIterator[TrainReport]:
        return self._entries(TrainReport, timeout, cancel_on_close)

    async def _read(self, value: Any) -> TrainResult:
        return core.result_as(TrainResult, value)


class AsyncAdapterJob(AsyncJob[AdapterResult]):
    async def _read(self, value: Any) -> AdapterResult:
        return core.result_as(AdapterResult, value)


_JOBS: dict[str, type[AsyncEmbedJob] | type[AsyncGenerateJob] | type[AsyncTrainJob] | type[AsyncAdapterJob]] = {
    "embed": AsyncEmbedJob,
    "generate": AsyncGenerateJob,
    "train": AsyncTrainJob,
    "adapters": AsyncAdapterJob,
}
