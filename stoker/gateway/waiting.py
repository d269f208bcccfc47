"""Requests that wait for jobs: whether another one waits for the same, or may come again, and who counts what a job
takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from stoker.client.asynchronously import finished
from stoker.errors import JobCancelled, StokerError
from stoker.gateway.tasks import ended

log = logging.getLogger(__name__)

#: Cancels a job.
Cancel: TypeAlias = Callable[[], Awaitable[None]]
#: The tokens that a job has taken by its end.
Total: TypeAlias = Callable[[], Awaitable[int]]
#: The client that has sent a job, and its id.
Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Lingering:
    """A request whose client has left. `rest`: what is done unless it comes again. `counted`: tokens that were counted
    for it; None: its job is counted for another one."""

    rest: asyncio.Task[None]
    counted: int | None


class Waiting:
    """All requests of a gateway that wait, and what goes on for clients that have left."""

    def __init__(self) -> None:
        self.of: dict[Key, set[Waiter]] = {}
        #: Requests whose client has left and may send them again: one for each job, which no other waits for.
        self.lingering: dict[Key, Lingering] = {}
        self._behind: set[asyncio.Task[None]] = set()

    def go_on(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(call)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return task

    async def end(self) -> None:
        await ended(self._behind)


class Waiter:
    """A request that waits for its job, as a context manager. `keep`: the job goes on when the client leaves; if not,
    it does for `lingers` seconds, in which the same request may come again. `counts`: what the job takes is counted
    (`spend`) for this request."""

    def __init__(
        self,
        waiting: Waiting,
        key: Key,
        spend: Callable[[int], Awaitable[None]],
        *,
        keep: bool,
        counts: bool,
        lingers: float = 0.0,
    ) -> None:
        self.counts, self.keeps = counts, keep
        self._waiting, self._key, self._spend, self._lingers = waiting, key, spend, lingers
        self._counted = 0

    def __enter__(self) -> Waiter:
        self._waiting.of.setdefault(self._key, set()).add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> set[Waiter]:
        """The others that wait."""
        others = self._waiting.of.get(self._key, set())
        others.discard(self)
        if not others:
            self._waiting.of.pop(self._key, None)
        return others

    def has_sent(self, cancel: Cancel, total: Total) -> Callable[[], Awaitable[None]]:
        """The job is there. What is to be awaited when the client leaves: `left`. From now on it is this request that
        cancels the job, and counts what it takes, in the place of one whose client had left and sent it again."""
        before = self._waiting.lingering.pop(self._key, None)
        if before is not None:
            before.rest.cancel()
            if before.counted is not None:
                self.counts, self._counted = True, before.counted
        return partial(self.left, cancel, total)

    async def took(self, tokens: int) -> None:
        """Count what is new of the tokens that the job has taken by now."""
        new, self._counted = tokens - self._counted, max(tokens, self._counted)
        if self.counts and new > 0:
            await self._spend(new)

    async def left(self, cancel: Cancel, total: Total) -> None:
        """The client has gone. The job is cancelled, unless it is to go on or another request waits for it; what it
        takes is counted also where nobody waits."""
        others = self._leave()
        if not self.keeps and not others and self._lingers:
            rest = self._waiting.go_on(self._linger(cancel, total))
            self._waiting.lingering[self._key] = Lingering(rest, self._counted if self.counts else None)
            return
        if not self.keeps and not others:
            await finished(cancel)
        if self.counts and not any(other.counts for other in others):
            self._waiting.go_on(self._count(total))

    async def _linger(self, cancel: Cancel, total: Total) -> None:
        """Leave, unless another request takes over first; one that sends the job just now may be refused yet."""
        await asyncio.sleep(self._lingers)
        while self._key in self._waiting.of:
            await asyncio.sleep(self._lingers)
        self._waiting.lingering.pop(self._key)
        try:
            await cancel()
        except StokerError as error:
            log.warning("job %s, whose client has left, is not cancelled: %s", self._key[1], error)
        if self.counts:
            await self._count(total)

    async def _count(self, total: Total) -> None:
        try:
            await self.took(await total())
        except JobCancelled:
            # What has no stream has made nothing by then.
            return
        except StokerError as error:
            log.warning("what job %s takes behind its client is not counted: %s", self._key[1], error)
