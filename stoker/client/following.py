"""One reader of one job: what to ask the broker next, and what its answers mean. Each entry comes once, in order.

Entries come twice: replayed from the Redis Stream, and live from the channel. `Follower` does no input or output, so
that the blocking client and the asyncio client only carry its questions and answers.
"""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

from pydantic import ValidationError

from stoker.broker import keys
from stoker.broker.connection import Patience
from stoker.broker.ledger.record import Summary, summary
from stoker.broker.outcome import Outcome, announced, lost
from stoker.broker.pipeline import Pipeline
from stoker.contract import StreamToken, TrainReport
from stoker.contract.shown import brief
from stoker.errors import InvalidRequest, JobLost, JobTimeout

if TYPE_CHECKING:
    from stoker.settings import Settings

#: Entries that one replay fetches.
PAGE = 512
#: Seconds without a message after which a reader looks again, and finds what pub/sub lost.
QUIET = 1.0
#: Jobs whose end a client remembers.
REMEMBERED = 1024
#: Seconds without an owner after which a reader asks whether there is a worker for the job at all.
UNOWNED = 3.0
#: The longest time between two looks whether a job that waits is past its deadline; a twentieth of that, else.
LONGEST_LATE = 60.0

E = TypeVar("E", StreamToken, TrainReport)

P = TypeVar("P", bound=Pipeline)

Rows = Sequence[tuple[bytes, Mapping[bytes, bytes]]]
Clock = Callable[[], float]


class Heard(TypedDict):
    """A message of a channel, as redis-py gives it."""

    channel: bytes
    data: bytes


@dataclass(frozen=True)
class Lateness:
    """Of a job that waits in `queue`. `deadline`: seconds from its submission."""

    queue: str
    deadline: float


class Behind:
    """What a reader meets that takes its messages more slowly than they come. The broker is there: it costs no
    patience."""


def checked_timeout(seconds: float | None) -> float | None:
    """`seconds`; None: no limit. Raises `InvalidRequest` for what is no time."""
    if seconds is not None and not (isinstance(seconds, int | float) and abs(seconds) <= sys.float_info.max):
        raise InvalidRequest(f"timeout: {brief(seconds)} given; expected seconds, or None for no limit.")
    return seconds


class TimeLimit:
    """The caller's own time limit: seconds without an entry or a result. None: no limit."""

    def __init__(self, job_id: str, seconds: float | None, clock: Clock = time.monotonic) -> None:
        self._job_id, self._seconds, self._clock = job_id, checked_timeout(seconds), clock
        self.restart()

    def restart(self) -> None:
        self._end = None if self._seconds is None else self._clock() + self._seconds

    def slice(self, longest: float) -> float:
        """Seconds to wait at a time; raises `JobTimeout` when none are left."""
        if self._end is None:
            return longest
        left = self._end - self._clock()
        if left <= 0:
            raise JobTimeout(
                f"job {self._job_id}: nothing came within {self._seconds:g} s. It goes on: ask again, or cancel it."
            )
        return min(left, longest)


class Follower(Generic[E]):
    """Follows a job to its `outcome`. `entry`: what its stream holds; None for a reader that wants the outcome alone.

    Its client subscribes to `channels` and says so with `subscribed`. Then, until there is an outcome: where
    `must_look`, it runs the commands of `ask` and hands the replies to `looked`; else it waits for a message for `wait`
    seconds, and hands what came (None: nothing) to `heard`. Both return the entries that are due. After a lost
    connection the client pauses for `pause` seconds and subscribes again.
    """

    def __init__(
        self,
        settings: Settings,
        job_id: str,
        entry: type[E] | None = None,
        timeout: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.job_id = job_id
        #: How the job ended; None until that is known.
        self.outcome: Outcome | None = None
        #: Index of the entry that is due.
        self.next = 0
        self._entry: type[E] | None = entry
        self._clock = clock
        self._limit, self._patience = TimeLimit(job_id, timeout, clock), Patience(settings)
        self._something_came = False
        #: Until the job has had an owner, or the reader has asked why it has none.
        self._unexplained, self._began = True, clock()
        self._late: Lateness | None = None
        self._asked_late = -math.inf
        self.subscribed()

    @property
    def channels(self) -> list[str]:
        """Where the result is announced and, for a reader of entries, where these come live."""
        return [keys.result(self.job_id)] + ([keys.channel(self.job_id)] if self._entry is not None else [])

    @property
    def since(self) -> str:
        """The stream id from which a replay has to begin."""
        return keys.entry_id(self.next)

    @property
    def must_look(self) -> bool:
        """Whether to ask the broker for the result and the entries that are due, instead of waiting for a message."""
        return self._look or self._clock() >= self._quiet_until

    def asks_why(self) -> bool:
        """Whether the job has had no owner for so many seconds that the reader asks why. True once."""
        waits = self._unexplained and not self.next and self.outcome is None
        if not waits or self._clock() - self._began < UNOWNED:
            return False
        self._unexplained = False
        return True

    def lateness(self) -> Lateness | None:
        """What to end the job by, if it waits and may be past its deadline: a worker sees that as it takes the job, and
        there may be none, or others in between. The broker's clock decides. Now and then."""
        if self._late is None or self.outcome is not None:
            return None
        every = min(LONGEST_LATE, max(QUIET, self._late.deadline / 20))
        if self._clock() - self._asked_late < every:
            return None
        self._asked_late = self._clock()
        return self._late

    def subscribed(self) -> None:
        """The channels are heard from now on; what was published before has to be looked up."""
        self._look, self._quiet_until = True, 0.0

    def ask(self, pipeline: P) -> P:
        """Put into `pipeline`: the result, the job's kind and owner, and the entries that are due."""
        ask_state(pipeline, self.job_id)
        if self._entry is not None:
            pipeline.xrange(keys.stream(self.job_id), min=self.since, count=PAGE)
        return pipeline

    def looked(self, replies: Sequence[object]) -> list[E]:
        """The entries that `ask` has brought. Raises `JobLost` if the broker knows nothing of the job,
        and for one that is done and whose stream has gone: no tokens would be another text."""
        self._patience.renew()
        record, known, rows = self._said(*replies)
        self._unexplained &= not known.owned
        waits = known.queue is not None and known.deadline is not None and not known.owned
        self._late = Lateness(str(known.queue), known.deadline or 0.0) if waits else None
        entries = self.replay(rows)
        self._something_came |= bool(entries)
        if len(rows) == PAGE:
            return entries
        self.outcome = Outcome.parse(record)
        if self.outcome is None and known.kind is None:
            if not entries:
                raise lost(self.job_id)
            return entries
        if self._entry is StreamToken and self.outcome is not None and self.outcome.tokens > self.next:
            raise self._lost_tokens()
        self._look, self._quiet_until = False, self._clock() + QUIET
        return entries

    def _said(self, record: Any, reply: Any, rows: Any = ()) -> tuple[bytes | None, Summary, Rows]:
        """The replies to `ask`: the result, what is known of the job, and a page of the stream."""
        return record, summary(self.job_id).parse(reply), rows

    def wait(self) -> float:
        """Seconds to wait for a message; raises `JobTimeout` at the end of the caller's time limit."""
        self._begin_limit()
        return self._limit.slice(max(0.0, self._quiet_until - self._clock()))

    def heard(self, message: Heard | None) -> list[E]:
        """The entry of a message, if it is the one due."""
        if message is None:
            return []
        self._something_came, self._quiet_until = True, self._clock() + QUIET
        if self._entry is not None and message["channel"] == keys.channel(self.job_id).encode():
            entry, self._look = self.live(message["data"])
            return [] if entry is None else [entry]
        # A reader of entries looks again: the result alone does not say that it has them all.
        self.outcome = None if self._entry is not None else announced(message["data"])
        self._look = self.outcome is None
        return []

    def pause(self, error: Exception) -> float:
        """Seconds to wait before the next try; raises `BrokerUnavailable` when the patience is at its end."""
        self._begin_limit()
        return self._limit.slice(0.0 if isinstance(error, Behind) else self._patience.spend(error))

    def _begin_limit(self) -> None:
        """From here, and not from the moment when something came: the caller may have taken long over it."""
        if self._something_came:
            self._limit.restart()
            self._something_came = False

    def value(self) -> object:
        """What the job made; raises what it ended with. For a reader that has followed it to its outcome."""
        if self.outcome is None:
            raise lost(self.job_id)
        return self.outcome.unwrap(self.job_id)

    def replay(self, rows: Rows) -> list[E]:
        """The entries of a page of the stream, from the one that is due. Raises `JobLost` for an entry that no worker
        wrote: a gap behind it could not be seen. And for tokens that the broker has lost: a text without them is
        another one. A run's reports stand for themselves."""
        try:
            entries = self._parsed(fields[b"entry"] for _, fields in rows)
            if any(keys.entry_id(entry.index).encode() != row for entry, (row, _) in zip(entries, rows, strict=False)):
                raise KeyError("an entry under another's id")
        except (ValidationError, KeyError):
            raise JobLost(
                "the job's stream holds an entry that Stoker did not write, and cannot be followed any further. "
                "`result()` has the whole, once the job is done."
            ) from None
        due = [entry for entry in entries if entry.index >= self.next]
        if self._entry is StreamToken and any(entry.index != at for at, entry in enumerate(due, self.next)):
            raise self._lost_tokens()
        if due:
            self.next = due[-1].index + 1
        return due

    def _lost_tokens(self) -> JobLost:
        return JobLost(
            f"job {self.job_id}: the broker has lost tokens of its stream, behind {self.next} that came. "
            "`result()` has the whole, once the job is done."
        )

    def live(self, payload: bytes) -> tuple[E | None, bool]:
        """The entry of a message if it is the one due, and whether entries before it were missed."""
        try:
            (entry,) = self._parsed([payload])
        except ValidationError:
            # No worker sent this: look at the stream itself.
            return None, True
        if entry.index != self.next:
            return None, entry.index > self.next
        self.next += 1
        return entry, False

    def _parsed(self, payloads: Iterable[bytes]) -> list[E]:
        return [self._entry.model_validate_json(payload) for payload in payloads] if self._entry is not None else []


class Ended:
    """Jobs that a client has followed to their end lately: their outcome needs no waiting for."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, None] = OrderedDict()

    def remember(self, job_id: str) -> None:
        self._jobs[job_id] = None
        while len(self._jobs) > REMEMBERED:
            self._jobs.popitem(last=False)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs


def ask_state(pipeline: P, job_id: str) -> P:
    """Put into `pipeline`: the result, and the job's `summary`."""
    pipeline.get(keys.result(job_id))
    summary(job_id).send(pipeline)
    return pipeline
