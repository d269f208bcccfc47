"""Jobs that were sent: waiting for them, following what they stream, cancelling."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Generic, TypeVar

from stoker.broker.outcome import JobStatus, result_as, vectors_reply
from stoker.client._async.link import AsyncLink
from stoker.client.asynchronously import LEFT, finished
from stoker.contract import AdapterResult, GenerateResult, RerankResult, StreamToken, TrainReport, TrainResult, Usage
from stoker.contract.kinds import ADAPTERS, EMBED, GENERATE, TRAIN
from stoker.contract.requests import RERANK
from stoker.contract.vectors import Encoded, plain

if TYPE_CHECKING:
    import numpy as np

R = TypeVar("R")
E = TypeVar("E", StreamToken, TrainReport)


class AsyncJob(Generic[R]):
    """A job that was sent. It goes on whether or not a client waits for it.

    A job can be pickled, and found again in another process: see the client's own note on that.
    """

    def __init__(self, link: AsyncLink, job_id: str) -> None:
        #: What carries the job's questions: that of its client. A job that was unpickled has one of its own to close.
        self.link = link
        self.id = job_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.link, self.id)

    async def result(self, timeout: float | None = None) -> R:
        """Wait for the end and return what the job made.

        Raises the worker's error as the same class, `JobCancelled`, `JobLost`, `BrokerUnavailable` if the broker stays
        away longer than `STOKER_PATIENCE` seconds, and `JobTimeout` after `timeout` seconds (the job goes on).
        """
        return await self._read(await self.link.value(self.id, timeout))

    async def status(self) -> JobStatus:
        """Where the job is now. Raises `JobLost` if the broker does not know it."""
        return await self.link.status(self.id)

    async def cancel(self) -> None:
        """Stop the job wherever it is: waiting, running, or already done (then nothing happens).

        Raises `JobLost` if the broker does not know it.
        """
        await self.link.cancel(self.id)

    async def _read(self, value: object) -> R:
        raise NotImplementedError

    async def _entries(self, entry: type[E], timeout: float | None, cancel_on_close: bool) -> AsyncGenerator[E]:
        try:
            async with aclosing(self.link.entries(self.id, entry, timeout)) as entries:
                async for item in entries:
                    yield item
        except LEFT:
            if cancel_on_close:
                await finished(self.cancel)
            raise


class AsyncAnswerJob(AsyncJob[R]):
    """A job whose result is for its client alone."""

    async def discard(self) -> None:
        """Take what the job has made out of the broker now, instead of a day after its end (vectors: ten minutes after
        they were fetched). It is gone then for all who have the job's id. Nothing, for a job that is not done."""
        await self.link.discard(self.id)


class AsyncEmbedJob(AsyncAnswerJob["np.ndarray"]):
    """`result()` is (texts, dim), float32; float16 if `dtype` asked for it."""

    async def encoded(self, timeout: float | None = None) -> Encoded:
        """As `result`, except that int8 comes as it travelled: codes (texts, dim) and scales, one for each text."""
        return await self._fetch(await self.link.value(self.id, timeout))

    async def usage(self, timeout: float | None = None) -> Usage:
        """Wait for the end, and say what the job took; the vectors stay where they are."""
        return vectors_reply(self.id, await self.link.value(self.id, timeout)).usage

    async def _read(self, value: object) -> np.ndarray:
        return plain(await self._fetch(value))

    async def _fetch(self, value: object) -> Encoded:
        return await self.link.vectors(self.id, vectors_reply(self.id, value))


class AsyncRerankJob(AsyncAnswerJob[RerankResult]):
    """`result()` has the score of each text, and says which are the best."""

    async def _read(self, value: object) -> RerankResult:
        reply = vectors_reply(self.id, value)
        scores = plain(await self.link.vectors(self.id, reply))
        return RerankResult(scores=tuple(scores.reshape(-1).tolist()), usage=reply.usage)


class AsyncGenerateJob(AsyncAnswerJob[GenerateResult]):
    """`stream()` yields tokens as they are made; `result()` is the whole."""

    def stream(self, *, timeout: float | None = None, cancel_on_close: bool = True) -> AsyncGenerator[StreamToken]:
        """Every token once, in order, also those made before the call. May be called again until the stream expires.

        Leaving the loop early cancels the job, unless `cancel_on_close` is False. `timeout`: seconds without a token.
        With asyncio, a cancelled task or scope leaves it too. Where `break` or an error may leave it, wrap the stream
        in `contextlib.aclosing`, so that the job is cancelled at once.
        """
        return self._entries(StreamToken, timeout, cancel_on_close)

    async def _read(self, value: object) -> GenerateResult:
        return result_as(GenerateResult, value)


class AsyncTrainJob(AsyncJob[TrainResult]):
    """`progress()` yields a report a step; `result()` names the adapter."""

    def progress(self, *, timeout: float | None = None, cancel_on_close: bool = False) -> AsyncGenerator[TrainReport]:
        """Every report once, in order. `timeout`: seconds without a report. Leaving the loop early lets the run go on,
        unless `cancel_on_close`."""
        return self._entries(TrainReport, timeout, cancel_on_close)

    async def _read(self, value: object) -> TrainResult:
        return result_as(TrainResult, value)


class AsyncAdapterJob(AsyncJob[AdapterResult]):
    """`result()` says which version the adapter has become."""

    async def _read(self, value: object) -> AdapterResult:
        return result_as(AdapterResult, value)


#: Any of them, as a job is found by its id.
AnyAsyncJob = AsyncEmbedJob | AsyncRerankJob | AsyncGenerateJob | AsyncTrainJob | AsyncAdapterJob

#: Kind → its jobs.
JOBS: dict[str, type[AsyncEmbedJob] | type[AsyncGenerateJob] | type[AsyncTrainJob] | type[AsyncAdapterJob]] = {
    EMBED.name: AsyncEmbedJob,
    GENERATE.name: AsyncGenerateJob,
    TRAIN.name: AsyncTrainJob,
    ADAPTERS.name: AsyncAdapterJob,
}
#: What was asked for → its jobs.
JOBS_BY_ABILITY = {**JOBS, RERANK: AsyncRerankJob}
