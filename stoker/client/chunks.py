"""What bulk calls decide without the broker: cutting texts into jobs, how many are in flight, what is tried again."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from stoker.contract import Presence
from stoker.contract.shown import brief
from stoker.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobError,
    StokerError,
)

T = TypeVar("T")

#: Texts of a job: enough to fill batches, few enough to share a thousand texts among workers.
BATCH_TEXTS = 256
#: Characters of a job: one of long texts is still a matter of seconds, and a request of a few hundred kilobytes.
BATCH_CHARS = 500_000
#: How often a job is sent before its failure is the caller's.
ATTEMPTS = 3
#: Jobs in flight for each worker: one that computes, one that is tokenized, one that waits, one that is fetched.
JOBS_PER_WORKER = 4
#: The longest pause, in seconds, before the next try at a full queue.
LONGEST_PAUSE = 5.0
#: Seconds for which a count of workers holds.
COUNT_EVERY = 2.0


@dataclass(frozen=True)
class Plan:
    """`batch`: texts of a job. `in_flight`: jobs at once, None: by the workers there are. `attempts`: sends of one."""

    batch: int
    in_flight: int | None
    attempts: int

    def __post_init__(self) -> None:
        for name, value, most in (("batch", self.batch, 4096), ("attempts", self.attempts, 100)):
            if not _is_count(value, most):
                raise InvalidRequest(f"{name}: {brief(value)} given; 1 to {most} are allowed.")
        if self.in_flight is not None and not _is_count(self.in_flight, 10_000):
            raise InvalidRequest(f"in_flight: {brief(self.in_flight)} given; 1 to 10000 are allowed, or None.")


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and 1 <= value <= most


def checked_texts(texts: T) -> T:
    """Raises `InvalidRequest` for what is no iterable of texts."""
    if isinstance(texts, str):
        raise InvalidRequest("texts: one text given; expected many, such as a list or the lines of a file.")
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable | AsyncIterable):
        raise InvalidRequest(f"texts: a {type(texts).__name__} given; expected an iterable of texts.")
    return texts


@dataclass
class Part:
    """What one job of a bulk call is asked. `tries`: how often it was sent and failed."""

    tries: int = field(default=0, init=False)


@dataclass
class Chunk(Part):
    """The texts of one job. `start`: the index of the first among all."""

    start: int
    texts: list[str]


@dataclass
class Cutter:
    """Cuts a run of texts into chunks, one text at a time."""

    batch: int
    start: int = 0
    _texts: list[str] = field(default_factory=list)
    _chars: int = 0

    def add(self, text: object) -> Iterator[Chunk]:
        """Yields the chunk before `text` if that is full."""
        if not isinstance(text, str):
            index = self.start + len(self._texts)
            raise InvalidRequest(f"texts.{index}: a {type(text).__name__} given; expected text.")
        if self._texts and (len(self._texts) >= self.batch or self._chars + len(text) > BATCH_CHARS):
            yield from self.rest()
        self._texts.append(text)
        self._chars += len(text)

    def rest(self) -> Iterator[Chunk]:
        """Yields what is left, if anything is."""
        if self._texts:
            chunk = Chunk(self.start, self._texts)
            self.start += len(self._texts)
            self._texts, self._chars = [], 0
            yield chunk


def embedding_share(worker: Presence) -> int:
    """Embedding jobs that one bulk call keeps in flight for a worker."""
    return JOBS_PER_WORKER


class InFlightLimit:
    """How many jobs may be in flight now: `limit`. `models`: those that the jobs go to; the caller may add some.
    `share`: jobs in flight for a worker that has one of them."""

    def __init__(self, plan: Plan, models: Collection[str], share: Callable[[Presence], int] = embedding_share) -> None:
        self._plan, self._models, self._share = plan, models, share
        self._counted = -COUNT_EVERY
        self.limit = plan.in_flight or JOBS_PER_WORKER

    @property
    def stale(self) -> bool:
        """Whether it is time to count the workers again."""
        return self._plan.in_flight is None and time.monotonic() - self._counted >= COUNT_EVERY

    def count(self, workers: Sequence[Presence]) -> None:
        able = [worker for worker in workers if any(card.model in self._models for card in worker.models)]
        self.limit = sum(map(self._share, able)) or JOBS_PER_WORKER
        self._counted = time.monotonic()


def try_again(error: StokerError, part: Part, plan: Plan) -> bool:
    """Whether to send the part once more, whose job ended with `error`."""
    part.tries += 1
    meant = isinstance(error, JobCancelled | DeadlineExceeded | JobDead)
    return isinstance(error, JobError) and not meant and part.tries < plan.attempts


def named(error: InvalidRequest, chunk: Chunk) -> InvalidRequest:
    """`error` with the index of its text among all, instead of `texts.N` of the job."""
    text = re.sub(r"\btexts\.(\d+)", lambda match: f"texts.{int(match[1]) + chunk.start}", str(error), count=1)
    return type(error)(text)
