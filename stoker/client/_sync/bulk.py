# Generated from stoker/client/_async/bulk.py by `make format`: edit that file.
"""The loop of bulk embedding: send until enough is in flight, hand out the oldest."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from typing_extensions import Unpack

from stoker.client._sync.jobs import EmbedJob
from stoker.client.blocking import Texts, each, finished, sleep
from stoker.client.chunks import LONGEST_PAUSE, Chunk, Cutter, InFlightLimit, Plan, checked_texts, renumbered, try_again
from stoker.client.options import EmbedOptions
from stoker.contract import Presence
from stoker.contract.vectors import Encoded
from stoker.errors import InvalidRequest, QueueFull, StokerError


class Embedder(Protocol):
    """What the loop needs of a client."""

    def embed(self, texts: Sequence[str], *, model: str | None = None, **options: Unpack[EmbedOptions]) -> EmbedJob:
        """Send one job."""

    def workers(self) -> list[Presence]:
        """The workers that are alive now."""


def embed_chunks(client: Embedder, texts: Texts, model: str, plan: Plan, options: EmbedOptions) -> Generator[Encoded]:
    """The vectors of each job, in order."""
    waiting: deque[tuple[Chunk, EmbedJob]] = deque()
    in_flight = InFlightLimit(plan, model)
    chunks = _cut(texts, plan)
    try:
        while True:
            if in_flight.stale:
                in_flight.count(client.workers())
            # The oldest is fetched before the next one is sent, so no more than the limit is ever under way.
            if len(waiting) < in_flight.limit and (chunk := next(chunks, None)) is not None:
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
        finished(partial(_cancel, [job for _, job in waiting]))


def _cancel(jobs: Iterable[EmbedJob]) -> None:
    for job in jobs:
        with suppress(StokerError):
            job.cancel()


def _cut(texts: Texts, plan: Plan) -> Iterator[Chunk]:
    cutter = Cutter(plan.batch)
    for text in each(checked_texts(texts)):
        for chunk in cutter.add(text):
            yield chunk
    for chunk in cutter.rest():
        yield chunk


def _send(client: Embedder, chunk: Chunk, model: str, options: EmbedOptions) -> EmbedJob:
    """Send a chunk; a full queue is waited for."""
    while True:
        try:
            return client.embed(chunk.texts, model=model, **options)
        except InvalidRequest as error:
            raise type(error)(renumbered(str(error), chunk.start)) from None
        except QueueFull as error:
            sleep(min(LONGEST_PAUSE, error.wait))
