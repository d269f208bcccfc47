"""Requests that wait for jobs: whether another one waits for the same, and who counts what a job takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
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


class Waiting:
    """All requests of a gateway that wait, and what goes on for clients that have left."""

    def __init__(self) -> None:
        self.of: dict[Key, set[Waiter]] = {}
        self._behind: set[asyncio.Task[None]] = set()

    def go_on(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(call)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def end(self) -> None:
        await ended(self._behind)


class Waiter:
    """A request that waits for its job, as a context manager. `keep`: the job goes on when the client leaves. `counts`:
    what the job takes is counted (`spend`) for this request."""

    def __init__(
        self, waiting: Waiting, key: Key, spend: Callable[[int], Awaitable[None]], *, keep: bool, counts: bool
    ) -> None:
        self.counts, self.keeps = counts, keep
        self._waiting, self._key, self._spend = waiting, key, spend
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

    async def took(self, tokens: int) -> None:
        """Count what is new of the tokens that the job has taken by now."""
        new, self._counted = tokens - self._counted, max(tokens, self._counted)
        if self.counts and new > 0:
            await self._spend(new)

    async def left(self, cancel: Cancel, total: Total) -> None:
        """The client has gone. The job is cancelled, unless it is to go on or another request waits for it; what it
        takes is counted also where nobody waits."""
        others = self._leave()
        if not self.keeps and not others:
            await finished(cancel)
        if self.counts and not any(other.counts for other in others):
            self._waiting.go_on(self._count(total))

    async def _count(self, total: Total) -> None:
        try:
            await self.took(await total())
        except JobCancelled:
            # What has no stream has made nothing by then.
            return
        except StokerError as error:
            log.warning("what job %s takes behind its client is not counted: %s", self._key[1], error)
