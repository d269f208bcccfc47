"""The loop of bulk embedding: send until enough is in flight, hand out the oldest."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from typing_extensions import Unpack

from stoker.client._async.jobs import AsyncEmbedJob
from stoker.client.asynchronously import Texts, each, finished, sleep
from stoker.client.chunks import LONGEST_PAUSE, Chunk, Cutter, InFlightLimit, Plan, checked_texts, renumbered, try_again
from stoker.client.options import EmbedOptions
from stoker.contract import Presence
from stoker.contract.vectors import Encoded
from stoker.errors import InvalidRequest, QueueFull, StokerError


class AsyncEmbedder(Protocol):
    """What the loop needs of a client."""

    async def embed(
        self, texts: Sequence[str], *, model: str | None = None, **options: Unpack[EmbedOptions]
    ) -> AsyncEmbedJob:
        """Send one job."""

    async def workers(self) -> list[Presence]:
        """The workers that are alive now."""


async def embed_chunks(
    client: AsyncEmbedder, texts: Texts, model: str, plan: Plan, options: EmbedOptions
) -> AsyncGenerator[Encoded]:
    """The vectors of each job, in order."""
    waiting: deque[tuple[Chunk, AsyncEmbedJob]] = deque()
    in_flight = InFlightLimit(plan, model)
    chunks = _cut(texts, plan)
    try:
        while True:
            if in_flight.stale:
                in_flight.count(await client.workers())
            # The oldest is fetched before the next one is sent, so no more than the limit is ever under way.
            if len(waiting) < in_flight.limit and (chunk := await anext(chunks, None)) is not None:
                waiting.append((chunk, await _send(client, chunk, model, options)))
            elif waiting:
                chunk, job = waiting[0]
                try:
                    vectors = await job.encoded()
                except StokerError as error:
                    if not try_again(error, chunk, plan):
                        raise
                    waiting[0] = chunk, await _send(client, chunk, model, options)
                    continue
                waiting.popleft()
                await job.discard()
                yield vectors
            else:
                return
    finally:
        await finished(partial(_cancel, [job for _, job in waiting]))


async def _cancel(jobs: Iterable[AsyncEmbedJob]) -> None:
    for job in jobs:
        with suppress(StokerError):
            await job.cancel()


async def _cut(texts: Texts, plan: Plan) -> AsyncIterator[Chunk]:
    cutter = Cutter(plan.batch)
    async for text in each(checked_texts(texts)):
        for chunk in cutter.add(text):
            yield chunk
    for chunk in cutter.rest():
        yield chunk


async def _send(client: AsyncEmbedder, chunk: Chunk, model: str, options: EmbedOptions) -> AsyncEmbedJob:
    """Send a chunk; a full queue is waited for."""
    while True:
        try:
            return await client.embed(chunk.texts, model=model, **options)
        except InvalidRequest as error:
            raise type(error)(renumbered(str(error), chunk.start)) from None
        except QueueFull as error:
            await sleep(min(LONGEST_PAUSE, error.wait))
