"""One reader's place in a job's stream: each entry once, in order, whichever way it comes.

Entries come twice: replayed from the Redis Stream, and live from the channel. `Tail` does no input or output, so
that the blocking client and the asyncio one share it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from stoker import keys
from stoker.contract import StreamToken, TrainReport
from stoker.errors import JobLost, JobTimeout

#: Entries a replay fetches at once.
PAGE = 512
#: Seconds without a message after which a reader looks again: what pub/sub lost, it finds then.
QUIET = 1.0

E = TypeVar("E", StreamToken, TrainReport)

Rows = Iterable[tuple[bytes, dict[bytes, bytes]]]


class Tail(Generic[E]):
    """Turns rows and messages into entries; `next` is the index of the entry that is due."""

    def __init__(self, entry: type[E], start: int = 0) -> None:
        self._entry: type[E] = entry
        self.next = start

    @property
    def since(self) -> str:
        """The stream id from which a replay has to begin."""
        return keys.entry_id(self.next)

    def replay(self, rows: Rows) -> list[E]:
        """Raises `JobLost` for an entry that no worker wrote: what is behind it cannot be told from what is missing."""
        try:
            entries = [self._entry.model_validate_json(fields[b"entry"]) for _, fields in rows]
        except (ValidationError, KeyError):
            raise JobLost(
                "the job's stream holds an entry that Stoker did not write, and cannot be followed any further. "
                "`result()` has the whole, once the job is done."
            ) from None
        due = [entry for entry in entries if entry.index >= self.next]
        if due:
            self.next = due[-1].index + 1
        return due

    def live(self, payload: bytes) -> tuple[E | None, bool]:
        """The entry of a message if it is the one due, and whether some before it were missed."""
        try:
            entry = self._entry.model_validate_json(payload)
        except ValidationError:
            # Not a worker's: look at the stream itself.
            return None, True
        if entry.index != self.next:
            return None, entry.index > self.next
        self.next += 1
        return entry, False


class Limit:
    """The caller's own time limit: seconds without an entry or a result. None: no limit."""

    def __init__(self, job_id: str, seconds: float | None) -> None:
        self._job_id, self._seconds = job_id, seconds
        self.restart()

    def restart(self) -> None:
        self._end = None if self._seconds is None else time.monotonic() + self._seconds

    def slice(self, longest: float) -> float:
        """Seconds to wait at a time; raises `JobTimeout` when none are left."""
        if self._end is None:
            return longest
        left = self._end - time.monotonic()
        if left <= 0:
            raise JobTimeout(
                f"job {self._job_id}: nothing came within {self._seconds:g} s. It goes on: ask again, or cancel it."
            )
        return min(left, longest)


def commands(pipeline: Any, job_id: str, tail: Tail[Any] | None) -> Any:
    """Ask, in one transaction, for the result, the job's kind and owner, and the entries that are due."""
    pipeline.get(keys.result(job_id))
    pipeline.hmget(keys.job(job_id), "kind", "token")
    if tail is not None:
        pipeline.xrange(keys.stream(job_id), min=tail.since, count=PAGE)
    return pipeline


def channels(job_id: str, tail: Tail[Any] | None) -> list[str]:
    return [keys.result(job_id)] + ([keys.channel(job_id)] if tail is not None else [])
