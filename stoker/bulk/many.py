"""The two loops of bulk embedding, blocking and with `await`: send until enough is in flight, hand out the oldest."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stoker.bulk.chunks import LONGEST_PAUSE, Chunk, Cutter, Flight, Plan, placed, try_again
from stoker.contract.vectors import Encoded
from stoker.errors import InvalidRequest, QueueFull, StokerError

if TYPE_CHECKING:
    from stoker.aio import AsyncClient, AsyncEmbedJob
    from stoker.client import Client, EmbedJob


def embed_chunks(
    client: Client, texts: Iterable[str], model: str, plan: Plan, options: Mapping[str, Any]
) -> Iterator[Encoded]:
    """The vectors of each job, in order."""
    waiting: deque[tuple[Chunk, EmbedJob]] = deque()
    flight = Flight(plan, model)
    chunks = _cut(texts, plan)
    try:
        while True:
            if flight.stale:
                flight.count(client.workers())
            # The oldest is fetched before the next one is sent, so no more than the limit is ever under way.
            if len(waiting) < flight.limit and (chunk := next(chunks, None)) is not None:
                waiting.append((chunk, _send(client, chunk, model, options)))
            elif waiting:
                chunk, job = waiting[0]
                try:
                    vectors = job.encoded()
                except StokerError as error:
                    if not try_again(error, chunk, plan):
                        raise
                    waiting[0] = chunk, _send(client, chunk, model, options)
                    continue
                waiting.popleft()
                job.discard()
                yield vectors
            else:
                return
    finally:
        for _, job in waiting:
            with suppress(StokerError):
                job.cancel()


def _cut(texts: Iterable[str], plan: Plan) -> Iterator[Chunk]:
    cutter = Cutter(plan.batch)
    for text in _checked(texts):
        yield from cutter.add(text)
    yield from cutter.rest()


def _checked(texts: Any) -> Any:
    if isinstance(texts, str):
        raise InvalidRequest("texts: one text given; expected many, such as a list or the lines of a file.")
    if not isinstance(texts, Iterable | AsyncIterable):
        raise InvalidRequest(f"texts: a {type(texts).__name__} given; expected an iterable of texts.")
    return texts


def _send(client: Client, chunk: Chunk, model: str, options: Mapping[str, Any]) -> EmbedJob:
    """Send a chunk; a full queue is waited for."""
    while True:
        try:
            return client.embed(chunk.texts, model=model, **options)
        except InvalidRequest as error:
            raise type(error)(placed(str(error), chunk.start)) from None
        except QueueFull as error:
            time.sleep(min(LONGEST_PAUSE, error.wait))


async def embed_chunks_async(
    client: AsyncClient,
    texts: Iterable[str] | AsyncIterable[str],
    model: str,
    plan: Plan,
    options: Mapping[str, Any],
) -> AsyncGenerator[Encoded]:
    """The same, with `await`."""
    waiting: deque[tuple[Chunk, AsyncEmbedJob]] = deque()
    flight = Flight(plan, model)
    chunks = _cut_async(texts, plan)
    try:
        while True:
            if flight.stale:
                flight.count(await client.workers())
            if len(waiting) < flight.limit and (chunk := await anext(chunks, None)) is not None:
                waiting.append((chunk, await _send_async(client, chunk, model, options)))
            elif waiting:
                chunk, job = waiting[0]
                try:
                    vectors = await job.encoded()
                except StokerError as error:
                    if not try_again(error, chunk, plan):
                        raise
                    waiting[0] = chunk, await _send_async(client, chunk, model, options)
                    continue
                waiting.popleft()
                await job.discard()
                yield vectors
            else:
                return
    finally:
        for _, job in waiting:
            with suppress(StokerError):
                await job.cancel()


async def _cut_async(texts: Iterable[str] | AsyncIterable[str], plan: Plan) -> AsyncIterator[Chunk]:
    cutter = Cutter(plan.batch)
    async for text in _each(_checked(texts)):
        for chunk in cutter.add(text):
            yield chunk
    for chunk in cutter.rest():
        yield chunk


async def _each(texts: Iterable[str] | AsyncIterable[str]) -> AsyncIterator[str]:
    if isinstance(texts, AsyncIterable):
        async for text in texts:
            yield text
    else:
        for text in texts:
            yield text


async def _send_async(client: AsyncClient, chunk: Chunk, model: str, options: Mapping[str, Any]) -> AsyncEmbedJob:
    while True:
        try:
            return await client.embed(chunk.texts, model=model, **options)
        except InvalidRequest as error:
            raise type(error)(placed(str(error), chunk.start)) from None
        except QueueFull as error:
            await asyncio.sleep(min(LONGEST_PAUSE, error.wait))
