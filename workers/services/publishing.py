"""Publishing what running jobs make: to each job's Redis Stream and to its channel, from one side thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from redis.exceptions import RedisError

from stoker.broker import keys
from stoker.contract import StreamToken, TrainReport
from stoker.errors import JobFailed, WorkerUnavailable
from stoker.monitor.metrics import PUBLISH_LAG
from stoker.monitor.numbers import Series
from workers import clock
from workers.services.background import Background
from workers.services.recent import Recent
from workers.services.retrying import Retry

if TYPE_CHECKING:
    from engine.ticket import Entry

log = logging.getLogger(__name__)

#: Steps that may wait for a broker that is slow or away; then the engine waits too, so that memory stays bounded.
BACKLOG = 4096
#: The stream's expiry is renewed once in this many entries: one command less in almost every step.
RENEW_EVERY = 64
#: Entries that one script publishes: after an outage many wait, and a script holds up everybody else.
BATCH = 512
#: What a step made, and when (monotonic seconds).
Queued: TypeAlias = tuple[float, list["Entry"]]


@dataclass(frozen=True)
class _Left:
    """The job has ended here, or gone elsewhere."""

    job_id: str


@dataclass
class _Batch:
    """Everything that was queued. `waiters`: who wants to know when it is sent. `last`: nothing comes behind it."""

    steps: list[Queued] = field(default_factory=list)
    waiters: list[threading.Event] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    last: bool = False

    def add(self, item: Queued | threading.Event | _Left | None) -> None:
        if item is None:
            self.last = True
        elif isinstance(item, threading.Event):
            self.waiters.append(item)
        elif isinstance(item, _Left):
            self.left.append(item.job_id)
        else:
            self.steps.append(item)


#: How the script answers for a stream that has lost entries.
GAP = "GAP"
_PUBLISH = Path(__file__).with_name("publish.lua").read_text("utf-8")


class Publisher:
    """`publish` is called from the engine's thread and only queues. Order is kept; nothing is dropped, except what the
    broker will never take: `refused` hears of its job once, and `flush` of that job raises why."""

    def __init__(
        self,
        redis: Any,
        refused: Callable[[str, JobFailed], object] = lambda job_id, error: None,
        lag: Series | None = None,
    ) -> None:
        self._redis, self._refused = redis, refused
        #: How long entries wait here, one observation a step.
        self._lag = lag or Series(PUBLISH_LAG.buckets)
        self._queue: queue.Queue[Queued | threading.Event | _Left | None] = queue.Queue(BACKLOG)
        #: Entries that are not in the broker yet: without any, nobody has to wait for the thread's turn.
        self._unsent = 0
        self._recent = Recent()
        #: Jobs whose entries were refused → why. `forget` and `leave` end it.
        self._failed: dict[str, JobFailed] = {}
        self._lock = threading.Lock()
        self._stopping, self._ended = threading.Event(), threading.Event()
        #: Whether entries were given up because the worker ends. What comes behind them is not sent either: it would
        #: leave a gap in a stream, and the next owner of the job begins where the stream ends.
        self._gave_up = False
        self.thread = Background("publisher", self._round, stopped=self._ended)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Send what is queued, unless the broker is away, and end."""
        self._stopping.set()
        self._queue.put(None)
        self.thread.join(5)
        self._redis.close()

    def publish(self, entries: list[Entry]) -> None:
        with self._lock:
            self._unsent += len(entries)
        self._queue.put((time.monotonic(), entries))

    @property
    def unsent(self) -> int:
        """Entries that the broker does not have yet."""
        return self._unsent

    def flush(self, job_id: str) -> None:
        """Wait until everything that was published before is in the broker. Raises `JobFailed` if it did not take what
        this job published, and `WorkerUnavailable` if the worker ended before it did."""
        with self._lock:
            waits = self._unsent > 0
        if waits:
            sent = threading.Event()
            self._queue.put(sent)
            while not sent.wait(0.5):
                if not self.thread.alive:
                    raise RuntimeError("the publisher has ended")
        if self._gave_up:
            raise WorkerUnavailable("the worker ended while the broker was away.")
        if job_id in self._failed:
            raise self._failed[job_id]

    def forget(self, job_id: str) -> None:
        """The job begins here, perhaps again: what was refused of it before is no failure of this time."""
        self._failed.pop(job_id, None)

    def leave(self, job_id: str) -> None:
        """The job is no longer here: let go of all that is kept of it, behind what it has published."""
        if self._unsent or job_id in self._recent or job_id in self._failed:
            # Without a wait for a broker that is away: what is kept of streams has a bound.
            with suppress(queue.Full):
                self._queue.put_nowait(_Left(job_id))

    def _round(self) -> None:
        batch = self._collect()
        entries = [entry for _, made in batch.steps for entry in made]
        try:
            for start in range(0, len(entries), BATCH):
                self._send_until_sent(entries[start : start + BATCH])
            now = time.monotonic()
            for since, _ in batch.steps:
                self._lag.observe(now - since)
        finally:
            with self._lock:
                self._unsent -= len(entries)
            for job_id in batch.left:
                self._recent.forget(job_id)
                self._failed.pop(job_id, None)
            for waiter in batch.waiters:
                waiter.set()
            if batch.last:
                self._ended.set()

    def _collect(self) -> _Batch:
        """Everything that is queued."""
        batch = _Batch()
        batch.add(self._queue.get())
        while not batch.last:
            try:
                batch.add(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _send_until_sent(self, entries: list[Entry]) -> None:
        """Sending again is safe: Redis refuses an entry id that it has, and readers drop an index that they had."""
        retry = Retry()
        entries = [entry for entry in entries if entry[0] not in self._failed]
        while entries and not self._gave_up:
            try:
                return self._send(entries)
            except RedisError as error:
                pause = retry.pause(error)
                if pause is None:
                    return self._refuse(entries, error)
                log.warning("publishing waits for the broker: %s", error)
                self._gave_up = self._stopping.wait(pause)
            except Exception as error:
                return self._refuse(entries, error)

    def _send(self, entries: list[Entry], *, again: bool = False) -> None:
        """`again`: these mend a gap, and no other is looked for."""
        names: list[str] = []
        arguments: list[Any] = [keys.RESULT_TTL]
        seen: set[str] = set()
        now = clock.now(self._redis) if any(isinstance(entry, TrainReport) for _, entry in entries) else None
        for pair in entries:
            job_id, entry = pair
            renews = entry.is_last or entry.index % RENEW_EVERY == 0
            follows = not again and job_id not in seen and self._recent.follows(pair)
            seen.add(job_id)
            names += (keys.stream(job_id), keys.channel(job_id))
            arguments += (keys.entry_id(entry.index), _payload(entry, now), int(renews), int(follows))
        answer = self._redis.eval(_PUBLISH, len(names), *names, *arguments) or []
        wrong = {stream.decode(): reason.decode() for stream, reason in zip(answer[::2], answer[1::2], strict=True)}
        refused = {job_id: wrong[keys.stream(job_id)] for job_id in seen if keys.stream(job_id) in wrong}
        self._recent.took([pair for pair in entries if pair[0] not in refused])
        for job_id, reason in refused.items():
            self._answer(job_id, reason, [pair for pair in entries if pair[0] == job_id])

    def _answer(self, job_id: str, reason: str, entries: list[Entry]) -> None:
        """What to do about entries of one job that were not taken."""
        gap, _, due = reason.partition(" ")
        if gap != GAP:
            return self._fail(job_id, reason)
        mending = self._recent.since(job_id, int(due))
        log.warning("job %s: the broker lost entries from %s on; the last %s are sent again", job_id, due, len(mending))
        self._send([*mending, *entries], again=True)

    def _refuse(self, entries: list[Entry], error: Exception) -> None:
        """The broker will not take these together: send each job's alone, so that only jobs that are to blame fail."""
        jobs = list(dict.fromkeys(job_id for job_id, _ in entries))
        if len(jobs) == 1:
            return self._fail(jobs[0], str(error))
        for job_id in jobs:
            self._send_until_sent([entry for entry in entries if entry[0] == job_id])

    def _fail(self, job_id: str, reason: str) -> None:
        error = JobFailed(
            f"job {job_id}: the broker does not take what it publishes, at the key {keys.stream(job_id)} ({reason}). "
            "Delete that key if it is not a stream, and send the job again."
        )
        log.error("job %s: the broker does not take what it publishes, at the key %s", job_id, keys.stream(job_id))
        self._failed[job_id] = error
        self._refused(job_id, error)


def _payload(entry: StreamToken | TrainReport, now: float | None) -> str:
    """What travels of it. A report says when: people look at a run hours later."""
    return (entry.model_copy(update={"published": now}) if isinstance(entry, TrainReport) else entry).model_dump_json()
