"""Who runs the batches: one gateway for all of a place, until it ends or goes silent; then another one goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Iterable
from contextlib import suppress

from stoker.broker.batches import Batch, Batches, BatchRecord, Lease
from stoker.broker.connection import translated
from stoker.client._async.client import AsyncClient
from stoker.client.asked import generation_share
from stoker.client.asynchronously import finished
from stoker.client.chunks import ATTEMPTS, InFlightLimit, Plan, embedding_share
from stoker.errors import StokerError
from stoker.gateway.batch_answers import Answerer
from stoker.gateway.batch_run import BatchRun, InFlight, Overtaken
from stoker.gateway.calls import Caller, Models
from stoker.gateway.errors import Refused
from stoker.gateway.stored import Store
from stoker.gateway.tasks import ended

log = logging.getLogger(__name__)
#: Seconds between two looks at what there is to do.
LOOK_EVERY = 2.0
#: Batches that run at once: a short one does not wait for a long one before it.
AT_ONCE = 4
#: Seconds after which a batch whose run failed is tried again.
AGAIN_AFTER = 30.0


class Runner:
    """`broker`: the client whose broker knows the batches; `client`: the one that sends their jobs."""

    def __init__(self, client: AsyncClient, broker: AsyncClient, store: Store, models: Models) -> None:
        self._client, self._broker, self._store, self._models = client, broker, store, models
        self._lease: Lease | None = None
        self._runs: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._not_before: dict[str, float] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is something to do now."""
        self._wake.set()

    async def run_for_ever(self) -> None:
        try:
            while True:
                try:
                    await self._look()
                except (StokerError, OSError, Refused) as error:
                    # Whether the lease holds nobody knows then: another gateway may have it soon.
                    log.warning("batches do not run for now: %s", error)
                    await self._stop()
                await self._pause()
        finally:
            await finished(self._leave)

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY):
                await self._wake.wait()
        self._wake.clear()

    async def _look(self) -> None:
        """Begin what can be begun, and hear of cancels."""
        if not await self._store.is_used():
            return
        place = (await self._store.contents()).place
        # One that ends from here on is seen as it was before its end, and must not be run from there.
        running = set(self._runs)
        with translated(self._broker.settings):
            batches = await Batches(self._broker.redis).open(place)
            held = bool(batches or self._runs) and await self._held(place)
        if not held:
            await self._stop()
            return
        for batch in batches:
            if batch.cancelled and batch.record.id in self._runs:
                self._runs[batch.record.id][0].cancelled.set()
        for batch in self._chosen(batches, running):
            self._begin(batch)

    async def _held(self, place: str) -> bool:
        self._lease = self._lease or Lease(self._broker.redis, place)
        return await (self._lease.renew() if self._runs else self._lease.take())

    def _chosen(self, batches: Iterable[Batch], running: Container[str]) -> list[Batch]:
        """The oldest of each client first, of those that are not `running`."""
        now, turns = asyncio.get_running_loop().time(), dict[str, int]()
        waiting = list[tuple[int, Batch]]()
        for batch in batches:
            turn = turns[batch.record.owner] = turns.get(batch.record.owner, 0) + 1
            if batch.record.id not in running and self._not_before.get(batch.record.id, now) <= now:
                waiting.append((turn, batch))
        waiting.sort(key=lambda found: found[0])
        return [batch for _, batch in waiting[: max(0, AT_ONCE - len(self._runs))]]

    def _begin(self, batch: Batch) -> None:
        record = batch.record
        client = self._client if record.key is None else self._client.with_key(record.key)
        caller = Caller(record.key, None if record.models is None else frozenset(record.models))
        answers = Answerer(client, caller, self._models, record.endpoint)
        run = BatchRun(self._store, record, answers, self._write, self._limit_of(record))
        if batch.cancelled:
            run.cancelled.set()
        self._runs[record.id] = run, asyncio.ensure_future(self._carry(run))

    async def _carry(self, run: BatchRun) -> None:
        batch_id = run.record.id
        try:
            await run.run()
            log.info("batch %s: %s, %d of %d lines failed", batch_id, *_shown(run.record))
        except Overtaken:
            log.info("batch %s: another gateway has it", batch_id)
        except (StokerError, OSError, Refused) as error:
            log.warning("batch %s is tried again in %g s: %s", batch_id, AGAIN_AFTER, error)
            self._not_before[batch_id] = asyncio.get_running_loop().time() + AGAIN_AFTER
        except Exception:
            log.exception("batch %s is tried again in %g s: a defect of the gateway", batch_id, AGAIN_AFTER)
            self._not_before[batch_id] = asyncio.get_running_loop().time() + AGAIN_AFTER
        finally:
            self._runs.pop(batch_id, None)
            self.wake()

    async def _write(self, record: BatchRecord) -> bool:
        assert self._lease is not None
        with translated(self._broker.settings):
            return await Batches(self._broker.redis).write(record, self._lease.holder)

    def _limit_of(self, record: BatchRecord) -> InFlight:
        """All batches together have what one bulk call may have: half of what the workers can run at once."""
        share = embedding_share if record.endpoint == "/v1/embeddings" else generation_share
        models = set[str]()
        limit = InFlightLimit(Plan(1, None, ATTEMPTS), models, share)

        async def most(asked: set[str]) -> int:
            models.update(asked)
            if limit.stale:
                limit.count(await self._client.workers())
            return max(1, limit.limit // max(1, len(self._runs)))

        return most

    async def _stop(self) -> None:
        """Leave all batches as they are: they can be gone on with."""
        await ended(task for _, task in self._runs.values())
        self._runs.clear()

    async def _leave(self) -> None:
        await self._stop()
        if self._lease is not None:
            try:
                with translated(self._broker.settings):
                    await self._lease.give_back()
            except StokerError as error:
                log.info("the batches' lease runs out by itself: %s", error)


def _shown(record: BatchRecord) -> tuple[str, int, int]:
    return record.status, record.failed, record.total
