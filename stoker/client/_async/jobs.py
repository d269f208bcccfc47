"""Jobs that were sent: waiting for them, following what they stream, cancelling."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stoker import connection, keys, ledger
from stoker.asking import own_patience
from stoker.client.asynchronously import LEFT, finished, sleep
from stoker.client.following import Follower, ask_state
from stoker.client.outcome import JobStatus, lost, read_vectors, result_as, status_of
from stoker.connection import Patience, translated
from stoker.contract import AdapterResult, EmbedReply, GenerateResult, StreamToken, TrainReport, TrainResult
from stoker.contract.kinds import ADAPTERS, EMBED, GENERATE, TRAIN
from stoker.contract.vectors import Encoded, plain
from stoker.ledger.record import summary

if TYPE_CHECKING:
    import numpy as np

    from stoker.client._async.client import AsyncClient

R = TypeVar("R")
E = TypeVar("E", StreamToken, TrainReport)


class AsyncJob(Generic[R]):
    """A job that was sent. It goes on whether or not a client waits for it.

    A job can be pickled, and found again in another process: see the client's own note on that.
    """

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self._client, self.id = client, job_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._client, self.id)

    async def result(self, timeout: float | None = None) -> R:
        """Wait for the end and return what the job made.

        Raises the worker's error as the same class, `JobCancelled`, `JobLost`, `BrokerUnavailable` if the broker stays
        away longer than `STOKER_PATIENCE` seconds, and `JobTimeout` after `timeout` seconds (the job goes on).
        """
        return await self._read(await self._outcome(timeout))

    async def status(self) -> JobStatus:
        """Where the job is now. Raises `JobLost` if the broker does not know it."""
        with translated(self._client.settings):
            result, known = await ask_state(self._client.redis.pipeline(), self.id).execute()
        return status_of(result, summary(self.id).parse(known), self.id)

    async def cancel(self) -> None:
        """Stop the job wherever it is: waiting, running, or already done (then nothing happens)."""
        with translated(self._client.settings):
            known = await summary(self.id).on_async(self._client.redis)
            if known.queue is None:
                raise lost(self.id)
            await ledger.cancellation(self.id, known.queue).on_async(self._client.redis)

    async def _read(self, value: Any) -> R:
        raise NotImplementedError

    async def _outcome(self, timeout: float | None) -> Any:
        follower = Follower[StreamToken](self._client.settings, self.id, timeout=timeout)
        async for _ in self._follow(follower):
            pass
        return follower.value()

    async def _entries(self, entry: type[E], timeout: float | None, cancel_on_close: bool) -> AsyncGenerator[E]:
        follower = Follower(self._client.settings, self.id, entry, timeout)
        try:
            async with aclosing(self._follow(follower)) as entries:
                async for item in entries:
                    yield item
        except LEFT:
            if cancel_on_close:
                await finished(self.cancel)
            raise
        follower.value()

    async def _follow(self, follower: Follower[E]) -> AsyncGenerator[E]:
        """Yield entries until the outcome is known; outlast the broker's outages for as long as patience lasts."""
        while follower.outcome is None:
            pubsub, pause = self._client.redis.pubsub(ignore_subscribe_messages=True), 0.0
            try:
                await pubsub.subscribe(*follower.channels)
                follower.subscribed()
                while follower.outcome is None:
                    for item in await self._more(pubsub, follower):
                        yield item
            except connection.TROUBLE as error:
                pause = follower.pause(error)
            finally:
                await finished(pubsub.aclose)
            await sleep(pause)

    async def _more(self, pubsub: Any, follower: Follower[E]) -> list[E]:
        if not follower.must_look:
            return follower.heard(await pubsub.get_message(timeout=follower.wait()))
        with own_patience():
            replies = await follower.ask(self._client.redis.pipeline()).execute()
        return follower.looked(replies)


class AsyncEmbedJob(AsyncJob["np.ndarray"]):
    """`result()` is (texts, dim), float32; float16 if `dtype` asked for it."""

    async def encoded(self, timeout: float | None = None) -> Encoded:
        """As `result`, except that int8 comes as it travelled: codes and scales."""
        return await self._fetch(await self._outcome(timeout))

    async def discard(self) -> None:
        """Take the vectors out of the broker now, instead of a day after the end."""
        with translated(self._client.settings):
            await self._client.redis.unlink(keys.blob(keys.vectors(self.id)))

    async def _read(self, value: Any) -> np.ndarray:
        return plain(await self._fetch(value))

    async def _fetch(self, value: Any) -> Encoded:
        reply = result_as(EmbedReply, value)
        patience = Patience(self._client.settings)
        while True:
            try:
                with translated(self._client.settings, passing=connection.TROUBLE), own_patience():
                    return read_vectors(reply, await self._client.redis.get(keys.blob(reply.blob)))
            except connection.TROUBLE as error:
                await sleep(patience.spend(error))


class AsyncGenerateJob(AsyncJob[GenerateResult]):
    """`stream()` yields tokens as they are made; `result()` is the whole."""

    def stream(self, *, timeout: float | None = None, cancel_on_close: bool = True) -> AsyncGenerator[StreamToken]:
        """Every token once, in order, also those made before the call. May be called again until the stream expires.

        Leaving the loop early cancels the job, unless `cancel_on_close` is False. `timeout`: seconds without a token.
        With asyncio, a cancelled task or scope leaves it too. Where `break` or an error may leave it, wrap the stream
        in `contextlib.aclosing`, so that the job is cancelled at once.
        """
        return self._entries(StreamToken, timeout, cancel_on_close)

    async def _read(self, value: Any) -> GenerateResult:
        return result_as(GenerateResult, value)


class AsyncTrainJob(AsyncJob[TrainResult]):
    """`progress()` yields a report a step; `result()` names the adapter."""

    def progress(self, *, timeout: float | None = None, cancel_on_close: bool = False) -> AsyncGenerator[TrainReport]:
        """Every report once, in order. Leaving the loop early leaves the run alone, unless `cancel_on_close`."""
        return self._entries(TrainReport, timeout, cancel_on_close)

    async def _read(self, value: Any) -> TrainResult:
        return result_as(TrainResult, value)


class AsyncAdapterJob(AsyncJob[AdapterResult]):
    """`result()` says which version the adapter has become."""

    async def _read(self, value: Any) -> AdapterResult:
        return result_as(AdapterResult, value)


#: Any of them, as a job is found by its id.
AnyAsyncJob = AsyncEmbedJob | AsyncGenerateJob | AsyncTrainJob | AsyncAdapterJob

#: Kind → its jobs.
JOBS: dict[str, type[AsyncEmbedJob] | type[AsyncGenerateJob] | type[AsyncTrainJob] | type[AsyncAdapterJob]] = {
    EMBED.name: AsyncEmbedJob,
    GENERATE.name: AsyncGenerateJob,
    TRAIN.name: AsyncTrainJob,
    ADAPTERS.name: AsyncAdapterJob,
}
