# Generated from stoker/client/_async/bulk.py by `make format`: edit that file.
"""The loop of bulk calls: send until enough is in flight, hand out the oldest."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from typing_extensions import Unpack

from stoker.client._sync.jobs import EmbedJob, GenerateJob
from stoker.client.asked import Asked, asked, checked_asks, generation_share, own
from stoker.client.blocking import Asks, Texts, each, finished, sleep
from stoker.client.chunks import LONGEST_PAUSE, Chunk, Cutter, InFlightLimit, Plan, checked_texts, named, try_again
from stoker.client.options import EmbedOptions, GenerateItem, GenerateOptions
from stoker.client.requests import Prompt
from stoker.contract import GenerateResult, Presence
from stoker.contract.kinds import GENERATE
from stoker.contract.vectors import Encoded
from stoker.errors import InvalidRequest, QueueFull, StokerError

P = TypeVar("P")
J = TypeVar("J", EmbedJob, GenerateJob | StokerError)
R = TypeVar("R")


class SendingClient(Protocol):
    """What the loop needs of a client."""

    def workers(self) -> list[Presence]:
        """The workers that are alive now."""


class Embedder(SendingClient, Protocol):
    """What bulk embedding needs of a client."""

    def embed(self, texts: Sequence[str], *, model: str | None = None, **options: Unpack[EmbedOptions]) -> EmbedJob:
        """Send one job."""


class GeneratingClient(SendingClient, Protocol):
    """What bulk generation needs of a client."""

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        model: str | None = None,
        seed: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerateJob:
        """Send one job."""

    def choose_model(self, model: str | None, kind: str) -> str:
        """The name to send to."""


class Bulk(Generic[P, J, R]):
    """One bulk call: its parts become jobs, and these become what the caller gets."""

    in_flight: InFlightLimit

    def send(self, part: P) -> J:
        raise NotImplementedError

    def fetch(self, part: P, job: J) -> R | None:
        """Wait for the end; None: the part is to be sent again."""
        raise NotImplementedError


class Embedding(Bulk[Chunk, EmbedJob, Encoded]):
    """The first error ends the call: vectors without one of them are of no use."""

    def __init__(self, client: Embedder, model: str, plan: Plan, options: EmbedOptions) -> None:
        self._client, self._model, self._plan, self._options = client, model, plan, options
        self.in_flight = InFlightLimit(plan, {model})

    def send(self, part: Chunk) -> EmbedJob:
        try:
            return self._client.embed(part.texts, model=self._model, **self._options)
        except InvalidRequest as error:
            raise named(error, part) from None

    def fetch(self, part: Chunk, job: EmbedJob) -> Encoded | None:
        try:
            vectors = job.encoded()
        except InvalidRequest as error:
            raise named(error, part) from None
        except StokerError as error:
            if try_again(error, part, self._plan):
                return None
            raise
        job.discard()
        return vectors


class Generating(Bulk[Asked, "GenerateJob | StokerError", "GenerateResult | StokerError"]):
    """An error is the result of its own request, and the others go on."""

    def __init__(self, client: GeneratingClient, model: str | None, plan: Plan) -> None:
        self._client, self._model, self._plan = client, model, plan
        self._chosen: str | None = None
        self._models = set[str]()
        self.in_flight = InFlightLimit(plan, self._models, generation_share)

    def send(self, part: Asked) -> GenerateJob | StokerError:
        if part.error is not None:
            return part.error
        item = part.item
        if part.model is None or part.model == self._model:
            # Once for all: what is warm may change meanwhile, and answers of one call are of one model.
            self._chosen = self._chosen or self._client.choose_model(self._model, GENERATE.name)
            item = {**item, "model": self._chosen}
        try:
            job = self._client.generate(**item)
        except QueueFull:
            raise
        except StokerError as error:
            return own(error)
        if model := item.get("model"):
            self._models.add(model)
        return job

    def fetch(self, part: Asked, job: GenerateJob | StokerError) -> GenerateResult | StokerError | None:
        if isinstance(job, StokerError):
            return job
        try:
            answer = job.result()
        except StokerError as error:
            return None if try_again(error, part, self._plan) else own(error)
        job.discard()
        return answer


@dataclass
class _Sent(Generic[P, J, R]):
    """A part whose turn has not come. `job`: the one under way; None: it has ended. `made`: what the part has become;
    None with no job: it is to be sent again."""

    part: P
    job: J | None
    made: R | None = None


def embed_chunks(client: Embedder, texts: Texts, model: str, plan: Plan, options: EmbedOptions) -> Generator[Encoded]:
    """The vectors of each job, in order."""
    with closing(_in_order(client, _cut(texts, plan), Embedding(client, model, plan, options))) as found:
        for vectors in found:
            yield vectors


def generate_answers(
    client: GeneratingClient, requests: Asks, plan: Plan, common: GenerateItem
) -> Generator[GenerateResult | StokerError]:
    """The answer to each request, or its error, in order."""
    bulk = Generating(client, common.get("model"), plan)
    with closing(_in_order(client, _asked(requests, common), bulk)) as found:
        for answer in found:
            yield answer


def _in_order(client: SendingClient, parts: Iterator[P], bulk: Bulk[P, J, R]) -> Generator[R]:
    waiting: deque[_Sent[P, J, R]] = deque()
    unsent: P | None = None
    try:
        while True:
            if bulk.in_flight.stale:
                bulk.in_flight.count(client.workers())
            # The oldest is fetched before the next one is sent, so no more than the limit is ever under way.
            if unsent is None and len(waiting) < bulk.in_flight.limit:
                unsent = next(parts, None)
            if unsent is not None and (job := _taken(bulk, unsent, wait=not waiting)) is not None:
                waiting.append(_Sent(unsent, job))
                unsent = None
            elif waiting:
                # At a full queue too: what fills it may be what jobs of this very call have made.
                found = _oldest(bulk, waiting)
                if found is not None:
                    waiting.popleft()
                    yield found
            elif unsent is None:
                return
    finally:
        finished(partial(_cancel, [sent.job for sent in waiting if sent.job is not None]))


def _oldest(bulk: Bulk[P, J, R], waiting: Sequence[_Sent[P, J, R]]) -> R | None:
    """What the oldest has made; None: that is to be asked again. Where it has to be sent again and finds a full queue,
    one of those behind it is fetched, and held until its turn."""
    oldest = waiting[0]
    if oldest.job is not None:
        _fetch(bulk, oldest)
    elif oldest.made is None:
        behind = next((sent for sent in waiting if sent.job is not None), None)
        oldest.job = _taken(bulk, oldest.part, wait=behind is None)
        if oldest.job is None and behind is not None:
            _fetch(bulk, behind)
    return oldest.made


def _fetch(bulk: Bulk[P, J, R], sent: _Sent[P, J, R]) -> None:
    assert sent.job is not None
    sent.made = bulk.fetch(sent.part, sent.job)
    sent.job = None


def _cancel(jobs: Iterable[EmbedJob | GenerateJob | StokerError]) -> None:
    for job in jobs:
        if not isinstance(job, StokerError):
            with suppress(StokerError):
                job.cancel()


def _taken(bulk: Bulk[P, J, R], part: P, *, wait: bool) -> J | None:
    """Try to send a part. None at a full queue, after a pause where there is nothing else to do (`wait`)."""
    try:
        return bulk.send(part)
    except QueueFull as error:
        if wait:
            sleep(min(LONGEST_PAUSE, error.wait))
        return None


def _cut(texts: Texts, plan: Plan) -> Iterator[Chunk]:
    cutter = Cutter(plan.batch)
    for text in each(checked_texts(texts)):
        for chunk in cutter.add(text):
            yield chunk
    for chunk in cutter.rest():
        yield chunk


def _asked(requests: Asks, common: GenerateItem) -> Iterator[Asked]:
    for given in each(checked_asks(requests)):
        yield asked(given, common)
