"""What the ledger holds, kept here, so that the broker is asked only for what is new: no input or output.

A queue is looked at by its newest jobs and its count. Only when the count differs from what is known here are its ids
asked for as a whole, to find those that ended without an event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from stoker.broker.ledger.record import Watched
from stoker.contract import TrainReport
from stoker.contract.kinds import TRAIN
from stoker.monitor.curve import Curve
from stoker.monitor.notices import Ended, Known, Progress, Started, TaskNotice, WaitsAgain

#: Ids that are compared in a second at most, by mean: a long queue is compared less often.
COMPARED = 1000.0
#: Runs that have ended whose curves are still shown.
ENDED_RUNS = 8


@dataclass
class MirroredJob:
    """A job that has not ended. `entries`: how much of it was published, None before that was counted; `pace`: how
    much of it a second."""

    known: Known
    worker: str | None = None
    entries: int | None = None
    counted: float = 0.0
    pace: float = 0.0


@dataclass
class Line:
    """One queue. `since`: the time of the newest job that is known."""

    model: str
    kind: str
    jobs: set[str] = field(default_factory=set)
    since: float = 0.0
    compared: float = 0.0

    def differs(self, count: int, now: float) -> bool:
        """Whether its ids have to be compared: some ended, and it is not too soon for a queue of this length."""
        return count != len(self.jobs) and now - self.compared >= max(1.0, len(self.jobs) / COMPARED)


class Mirror:
    def __init__(self) -> None:
        self.now = 0.0
        self.lines: dict[str, Line] = {}
        self.jobs: dict[str, MirroredJob] = {}
        #: Job id → curve, the oldest first; those that have ended stay for a while.
        self.runs: dict[str, Curve] = {}
        #: Job id → what is known of it, for each of `runs`.
        self._known_runs: dict[str, Known] = {}
        #: (model, kind) → jobs that were seen to be cancelled while they waited.
        self.cancelled: Counter[tuple[str, str]] = Counter()

    def follow(self, queue: str, model: str, kind: str) -> None:
        self.lines.setdefault(queue, Line(model, kind))

    def leave(self, known: Container[str]) -> None:
        """Follow no queue any more that is none of these, unless jobs of it are open: models come and go for as long as
        a monitor lives."""
        self.lines = {queue: line for queue, line in self.lines.items() if queue in known or line.jobs}

    def newcomers(self, queue: str, entries: Iterable[tuple[bytes, float]]) -> list[str]:
        """Ids of those of a queue's newest jobs that are not known yet."""
        line, found = self.lines[queue], []
        for raw, submitted in entries:
            line.since = max(line.since, submitted)
            if (job_id := raw.decode(errors="replace")) not in line.jobs:
                found.append(job_id)
        return found

    def vanished(self, queue: str, ids: Iterable[bytes]) -> tuple[list[str], list[str]]:
        """The ids of a queue as a whole: which known ones are gone, and which are new."""
        line = self.lines[queue]
        line.compared, there = self.now, {raw.decode(errors="replace") for raw in ids}
        return sorted(line.jobs - there), sorted(there - line.jobs)

    def hear(self, queue: str, job_id: str, said: Watched | None) -> list[TaskNotice]:
        """A job's record. One that no client wrote is counted, and shown to nobody."""
        line = self.lines[queue]
        if job_id not in line.jobs:
            line.jobs.add(job_id)
            if said is None:
                return []
        elif said is None or job_id not in self.jobs:
            return []
        known, job = Known.of(job_id, said), self.jobs.get(job_id)
        notices: list[TaskNotice] = [] if job is not None and job.known == known else [known]
        if job is None:
            job = self.jobs[job_id] = MirroredJob(known)
        was, job.known, job.worker = job.worker, known, said.worker
        if job.worker and job.worker != was:
            notices.append(Started(job_id, job.worker, self.now))
            if known.kind == TRAIN.name:
                self._known_runs[job_id] = known
                self.runs.setdefault(job_id, Curve())
        elif was and not job.worker:
            notices.append(WaitsAgain(job_id, self.now, said.crashes))
        return notices

    def end(self, queue: str, job_id: str, state: str, error: str) -> list[TaskNotice]:
        line = self.lines[queue]
        line.jobs.discard(job_id)
        job = self.jobs.pop(job_id, None)
        if job is not None and job.worker is None and state == "REVOKED":
            self.cancelled[line.model, line.kind] += 1
        ended = [run for run in self.runs if run not in self.jobs]
        for run in ended[:-ENDED_RUNS]:
            del self.runs[run], self._known_runs[run]
        return [Ended(job_id, state, self.now, error)]

    def end_unseen(self, job_id: str, state: str, error: str) -> list[TaskNotice]:
        """A job that ended while nobody watched."""
        return [Ended(job_id, state, self.now, error)]

    def report(self, job_id: str, reports: list[TrainReport]) -> list[TaskNotice]:
        """What a run has published since it was last asked."""
        curve = self.runs[job_id]
        for report in reports:
            curve.add(report)
        return [Progress(job_id, curve.text)] if reports else []

    def counted(self, job_id: str, entries: int) -> list[TaskNotice]:
        """How many tokens a job has published."""
        job = self.jobs[job_id]
        before, elapsed = job.entries, self.now - job.counted
        job.pace = max(0.0, (entries - before) / elapsed) if before is not None and elapsed > 0 else 0.0
        job.entries, job.counted = entries, self.now
        return [] if entries == before else [Progress(job_id, f"{entries} of at most {job.known.size}")]

    def rates(self) -> dict[str, float]:
        """Worker → tokens a second that its jobs publish, or learn from."""
        found: dict[str, float] = {}
        for job_id, job in self.jobs.items():
            curve = self.runs.get(job_id)
            pace = curve.last.tokens_per_second if curve and curve.last else job.pace
            if job.worker:
                found[job.worker] = found.get(job.worker, 0.0) + pace
        return found

    def run_of(self, job_id: str) -> Known:
        return self._known_runs[job_id]

    def owned(self, kind: str) -> list[str]:
        """Ids of the jobs of one kind that some worker owns."""
        return [name for name, job in self.jobs.items() if job.worker and job.known.kind == kind]


def ending(head: bytes | None) -> tuple[str, str]:
    """How a job ended, by the first bytes of its result, which is never read as a whole: it is its client's. The state,
    and the class of what it failed with."""
    text = (head or b"").decode(errors="replace")
    state = _after(text, '{"status": "')
    if state not in ("SUCCESS", "FAILURE", "REVOKED"):
        return "FAILURE", "JobLost: the broker has no result of it"
    return state, _after(text, '"exc_type": "') if state == "FAILURE" else ""


def _after(text: str, mark: str) -> str:
    _, found, rest = text.partition(mark)
    return rest.partition('"')[0] if found else ""
