"""A line of a batch, answered as a request to its endpoint would be, behind all others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from stoker.client._async.client import AsyncClient
from stoker.client._async.jobs import AsyncEmbedJob, AsyncGenerateJob
from stoker.client.asked import own
from stoker.client.chunks import ATTEMPTS, LONGEST_PAUSE, Part, Plan, try_again
from stoker.contract.requests import LOWEST_PRIORITY
from stoker.errors import QueueFull, StokerError
from stoker.gateway import chat, completions, embeddings
from stoker.gateway.answers import Generation
from stoker.gateway.calls import Call, Caller, Models, NamedJob
from stoker.gateway.embeddings import Embedding

#: The endpoints that a batch may have, and what reads a request to each.
READERS: Mapping[str, Callable[[Call], Awaitable[Generation | Embedding]]] = {
    "/v1/chat/completions": chat.asked,
    "/v1/completions": completions.asked,
    "/v1/embeddings": embeddings.asked,
}


class Answers(Protocol):
    """What runs a batch needs to have its lines answered."""

    async def answer(self, job_id: str, body: bytes, models: set[str]) -> tuple[str, bytes]:
        """The job that answered, and its answer as JSON; `models` gets the one that is asked. Raises `Refused`, and
        what meets all lines alike."""

    async def discard(self, job_id: str) -> None:
        """Its answer is written: it may leave the broker."""

    async def stop(self, job_id: str) -> None:
        """Nobody wants its answer any more."""


@dataclass(frozen=True)
class Answerer:
    """Over `client`, which sends for `caller`."""

    client: AsyncClient
    caller: Caller
    models: Models
    endpoint: str

    async def answer(self, job_id: str, body: bytes, models: set[str]) -> tuple[str, bytes]:
        part, plan = Part(), Plan(1, None, ATTEMPTS)
        while True:
            name = _named(job_id, part.tries)
            asked = await READERS[self.endpoint](self._call(name, body))
            models.add(asked.model)
            asked.options["priority"] = LOWEST_PRIORITY
            try:
                job = await _sent(asked, name)
            except StokerError as error:
                raise asked.names.refusal(own(error)) from None
            try:
                return name, await _made(asked, job)
            except StokerError as error:
                if not try_again(own(error), part, plan):
                    raise asked.names.refusal(error, by_worker=True) from None

    def _call(self, name: str, body: bytes) -> Call:
        return Call(self.client, self.caller, self.models, body, NamedJob(name), True, _never, _nothing)

    async def discard(self, job_id: str) -> None:
        await self.client.link.discard(job_id)

    async def stop(self, job_id: str) -> None:
        with suppress(StokerError):
            for tries in range(ATTEMPTS):
                # One that was never asked again has no further job: the first that is not known is the end.
                await self.client.link.cancel(_named(job_id, tries))


def _named(job_id: str, tries: int) -> str:
    """A job that failed is asked again under an id of its own, which another runner makes too."""
    return f"{job_id}-{tries}" if tries else job_id


async def _made(asked: Generation | Embedding, job: AsyncEmbedJob | AsyncGenerateJob) -> bytes:
    if isinstance(asked, Embedding):
        assert isinstance(job, AsyncEmbedJob)
        return (await asked.made(job, None))[0]
    assert isinstance(job, AsyncGenerateJob)
    return (await asked.made(job, None))[0]


async def _sent(asked: Generation | Embedding, name: str) -> AsyncEmbedJob | AsyncGenerateJob:
    """A full queue is waited for."""
    while True:
        try:
            return await asked.send(name)
        except QueueFull as error:
            await asyncio.sleep(min(LONGEST_PAUSE, max(0.1, error.wait)))


async def _never() -> Any:
    """There is no client that could leave."""
    await asyncio.Event().wait()


async def _nothing(caller: Caller, tokens: int) -> None:
    """What batches take is not counted for what a key may take in a minute."""
