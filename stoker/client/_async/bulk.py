"""The loop of bulk calls: send until enough is in flight, hand out the oldest."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from typing_extensions import Unpack

from stoker.client._async.jobs import AsyncEmbedJob, AsyncGenerateJob
from stoker.client.asked import Asked, asked, checked_asks, generation_share, own
from stoker.client.asynchronously import Asks, Texts, each, finished, sleep
from stoker.client.chunks import LONGEST_PAUSE, Chunk, Cutter, InFlightLimit, Plan, checked_texts, named, try_again
from stoker.client.options import EmbedOptions, GenerateItem, GenerateOptions
from stoker.client.requests import Prompt
from stoker.contract import GenerateResult, Presence
from stoker.contract.kinds import GENERATE
from stoker.contract.vectors import Encoded
from stoker.errors import InvalidRequest, QueueFull, StokerError

P = TypeVar("P")
J = TypeVar("J", AsyncEmbedJob, AsyncGenerateJob | StokerError)
R = TypeVar("R")


class AsyncSendingClient(Protocol):
    """What the loop needs of a client."""

    async def workers(self) -> list[Presence]:
        """The workers that are alive now."""


class AsyncEmbedder(AsyncSendingClient, Protocol):
    """What bulk embedding needs of a client."""

    async def embed(
        self, texts: Sequence[str], *, model: str | None = None, **options: Unpack[EmbedOptions]
    ) -> AsyncEmbedJob:
        """Send one job."""


class AsyncGeneratingClient(AsyncSendingClient, Protocol):
    """What bulk generation needs of a client."""

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        model: str | None = None,
        seed: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerateJob:
        """Send one job."""

    async def choose_model(self, model: str | None, kind: str) -> str:
        """The name to send to."""


class Bulk(Generic[P, J, R]):
    """One bulk call: its parts become jobs, and these become what the caller gets."""

    in_flight: InFlightLimit

    async def send(self, part: P) -> J:
        raise NotImplementedError

    async def fetch(self, part: P, job: J) -> R | None:
        """Wait for the end; None: the part is to be sent again."""
        raise NotImplementedError


class Embedding(Bulk[Chunk, AsyncEmbedJob, Encoded]):
    """The first error ends the call: vectors without one of them are of no use."""

    def __init__(self, client: AsyncEmbedder, model: str, plan: Plan, options: EmbedOptions) -> None:
        self._client, self._model, self._plan, self._options = client, model, plan, options
        self.in_flight = InFlightLimit(plan, {model})

    async def send(self, part: Chunk) -> AsyncEmbedJob:
        try:
            return await self._client.embed(part.texts, model=self._model, **self._options)
        except InvalidRequest as error:
            raise named(error, part) from None

    async def fetch(self, part: Chunk, job: AsyncEmbedJob) -> Encoded | None:
        try:
            vectors = await job.encoded()
        except InvalidRequest as error:
            raise named(error, part) from None
        except StokerError as error:
            if try_again(error, part, self._plan):
                return None
            raise
        await job.discard()
        return vectors


class Generating(Bulk[Asked, "AsyncGenerateJob | StokerError", "GenerateResult | StokerError"]):
    """An error is the result of its own request, and the others go on."""

    def __init__(self, client: AsyncGeneratingClient, model: str | None, plan: Plan) -> None:
        self._client, self._model, self._plan = client, model, plan
        self._chosen: str | None = None
        self._models = set[str]()
        self.in_flight = InFlightLimit(plan, self._models, generation_share)

    async def send(self, part: Asked) -> AsyncGenerateJob | StokerError:
        if part.error is not None:
            return part.error
        item = part.item
        if part.model is None or part.model == self._model:
            # Once for all: what is warm may change meanwhile, and answers of one call are of one model.
            self._chosen = self._chosen or await self._client.choose_model(self._model, GENERATE.name)
            item = {**item, "model": self._chosen}
        try:
            job = await self._client.generate(**item)
        except QueueFull:
            raise
        except StokerError as error:
            return own(error)
        if model := item.get("model"):
            self._models.add(model)
        return job

    async def fetch(self, part: Asked, job: AsyncGenerateJob | StokerError) -> GenerateResult | StokerError | None:
        if isinstance(job, StokerError):
            return job
        try:
            answer = await job.result()
        except StokerError as error:
            return None if try_again(error, part, self._plan) else own(error)
        await job.discard()
        return answer


@dataclass
class _Sent(Generic[P, J, R]):
    """A part whose turn has not come. `job`: the one under way; None: it has ended. `made`: what the part has become;
    None with no job: it is to be sent again."""

    part: P
    job: J | None
    made: R | None = None


async def embed_chunks(
    client: AsyncEmbedder, texts: Texts, model: str, plan: Plan, options: EmbedOptions
) -> AsyncGenerator[Encoded]:
    """The vectors of each job, in order."""
    async with aclosing(_in_order(client, _cut(texts, plan), Embedding(client, model, plan, options))) as found:
        async for vectors in found:
            yield vectors


async def generate_answers(
    client: AsyncGeneratingClient, requests: Asks, plan: Plan, common: GenerateItem
) -> AsyncGenerator[GenerateResult | StokerError]:
    """The answer to each request, or its error, in order."""
    bulk = Generating(client, common.get("model"), plan)
    async with aclosing(_in_order(client, _asked(requests, common), bulk)) as found:
        async for answer in found:
            yield answer


async def _in_order(client: AsyncSendingClient, parts: AsyncIterator[P], bulk: Bulk[P, J, R]) -> AsyncGenerator[R]:
    waiting: deque[_Sent[P, J, R]] = deque()
    unsent: P | None = None
    try:
        while True:
            if bulk.in_flight.stale:
                bulk.in_flight.count(await client.workers())
            # The oldest is fetched before the next one is sent, so no more than the limit is ever under way.
            if unsent is None and len(waiting) < bulk.in_flight.limit:
                unsent = await anext(parts, None)
            if unsent is not None and (job := await _taken(bulk, unsent, wait=not waiting)) is not None:
                waiting.append(_Sent(unsent, job))
                unsent = None
            elif waiting:
                # At a full queue too: what fills it may be what jobs of this very call have made.
                found = await _oldest(bulk, waiting)
                if found is not None:
                    waiting.popleft()
                    yield found
            elif unsent is None:
                return
    finally:
        await finished(partial(_cancel, [sent.job for sent in waiting if sent.job is not None]))


async def _oldest(bulk: Bulk[P, J, R], waiting: Sequence[_Sent[P, J, R]]) -> R | None:
    """What the oldest has made; None: that is to be asked again. Where it has to be sent again and finds a full queue,
    one of those behind it is fetched, and held until its turn."""
    oldest = waiting[0]
    if oldest.job is not None:
        await _fetch(bulk, oldest)
    elif oldest.made is None:
        behind = next((sent for sent in waiting if sent.job is not None), None)
        oldest.job = await _taken(bulk, oldest.part, wait=behind is None)
        if oldest.job is None and behind is not None:
            await _fetch(bulk, behind)
    return oldest.made


async def _fetch(bulk: Bulk[P, J, R], sent: _Sent[P, J, R]) -> None:
    assert sent.job is not None
    sent.made = await bulk.fetch(sent.part, sent.job)
    sent.job = None


async def _cancel(jobs: Iterable[AsyncEmbedJob | AsyncGenerateJob | StokerError]) -> None:
    for job in jobs:
        if not isinstance(job, StokerError):
            with suppress(StokerError):
                await job.cancel()


async def _taken(bulk: Bulk[P, J, R], part: P, *, wait: bool) -> J | None:
    """Try to send a part. None at a full queue, after a pause where there is nothing else to do (`wait`)."""
    try:
        return await bulk.send(part)
    except QueueFull as error:
        if wait:
            await sleep(min(LONGEST_PAUSE, error.wait))
        return None


async def _cut(texts: Texts, plan: Plan) -> AsyncIterator[Chunk]:
    cutter = Cutter(plan.batch)
    async for text in each(checked_texts(texts)):
        for chunk in cutter.add(text):
            yield chunk
    for chunk in cutter.rest():
        yield chunk


async def _asked(requests: Asks, common: GenerateItem) -> AsyncIterator[Asked]:
    async for given in each(checked_asks(requests)):
        yield asked(given, common)
