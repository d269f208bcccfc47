"""Whether a worker is there for the job of a request: a client that waits at this moment hears soon that none is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from stoker.broker import keys
from stoker.client._async.jobs import AnyAsyncJob
from stoker.client.model_choice import describe_absence, has_worker
from stoker.errors import BrokerUnavailable, WorkerUnavailable
from stoker.gateway.calls import Call
from stoker.gateway.tasks import ended
from stoker.gateway.waiting import Waiter

#: Seconds between two looks. Most requests are answered before the first one.
LOOK_EVERY = keys.PRESENCE_EVERY


class Attendance:
    """Of a request that waits for `job`, which needs a worker that has the `ability` with `model`. `left`: its request
    does not wait for it any longer."""

    def __init__(
        self,
        call: Call,
        model: str,
        ability: str,
        job: AnyAsyncJob,
        waiter: Waiter,
        left: Callable[[], Awaitable[None]],
    ) -> None:
        self._call, self._model, self._ability, self._job = call, model, ability, job
        self._waiter, self._left = waiter, left
        self._patience = call.client.settings.patience
        #: Since when no worker has been there, by the event loop's clock; None: one is, or the job has begun.
        self._since: float | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether no worker is there at this moment."""
        return self._since is not None

    @asynccontextmanager
    async def needed(self) -> AsyncIterator[None]:
        """Around the waiting for an answer, or for what comes first of it. Raises `WorkerUnavailable` once no worker
        has been there for `STOKER_PATIENCE` seconds. A job that has begun is waited for as before: it goes on where it
        was, when its worker has started again or another one comes."""
        try:
            async with asyncio.timeout(None) as limit:
                watch = asyncio.ensure_future(self._watch(limit))
                try:
                    yield
                finally:
                    self._since = None
                    await ended((watch,))
        except TimeoutError:
            if not limit.expired():
                raise
            raise await self._given_up() from None

    async def _watch(self, limit: asyncio.Timeout) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                if has_worker(self._model, self._ability, await self._call.models.workers()):
                    self._since = None
                elif await self._job.link.begun(self._job.id):
                    self._since = None
                    return
                elif self._since is None:
                    self._since = clock()
            except BrokerUnavailable:
                # Workers that it has not heard of for as long may all be there.
                self._since = None
            if self._since is not None and clock() - self._since >= self._patience:
                limit.reschedule(clock())
                return

    async def _given_up(self) -> WorkerUnavailable:
        """The job goes with its request. One that the client has named stays, so that the request can be repeated."""
        named = self._call.named.given and self._call.keep is None
        if not named:
            await self._left()
        workers = await self._call.models.workers()
        said = describe_absence(self._model, self._ability, workers, self._patience)
        goes_on = f" Job {self._job.id} goes on waiting: its id as Idempotency-Key finds it again."
        return WorkerUnavailable(said + goes_on * (named or self._waiter.keeps))
