"""The jobs that have not ended, asked for in two rounds of commands that a blocking or an asyncio client carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NotRequired

from typing_extensions import TypedDict

from stoker.broker import keys
from stoker.broker.ledger.call import Call
from stoker.broker.ledger.record import Listed, listed
from stoker.broker.pipeline import of_another_type
from stoker.contract.names import Rule, follows


class OpenJob(TypedDict):
    """A job that has not ended, as `stoker jobs list` prints it. `age`: seconds; `worker`: its owner, if it has one."""

    kind: str
    model: str
    client: str
    priority: int
    age: float
    worker: NotRequired[str]


def _shown(record: Listed, age: float) -> OpenJob:
    job = OpenJob(kind=record.kind, model=record.model, client=record.client, priority=record.priority, age=age)
    return job if record.worker is None else OpenJob(**job, worker=record.worker)


class Listing:
    """Jobs of `queues`: the replies to `ask_ids` go to `ask_records`, and the replies to those to `jobs`."""

    def __init__(self, queues: Iterable[str]) -> None:
        self._queues = tuple(queues)
        self._now = 0.0
        self._submitted: list[tuple[str, float]] = []
        self._calls: list[Call[Listed | None]] = []

    def ask_ids(self, pipeline: Any) -> Any:
        pipeline.time()
        for queue in self._queues:
            pipeline.zrange(keys.open_jobs(queue), 0, -1, withscores=True)
        return pipeline

    def ask_records(self, pipeline: Any, replies: Sequence[Any]) -> Any:
        (seconds, micros), *queues = replies
        self._now = float(seconds) + float(micros) / 1e6
        entries = [(job_id.decode(errors="replace"), float(at)) for queue in queues for job_id, at in queue]
        known = [entry for entry in entries if follows(Rule.JOB_ID, entry[0])]
        self._submitted = sorted(known, key=lambda entry: entry[1])
        self._calls = [listed(job_id) for job_id, _ in self._submitted]
        for call in self._calls:
            call.send(pipeline)
        return pipeline

    def jobs(self, replies: Sequence[Any]) -> dict[str, OpenJob]:
        """Oldest first. A job that ended between the two rounds is left out, and so is one whose record another program
        wrote over: replies may be errors."""
        jobs: dict[str, OpenJob] = {}
        for (job_id, submitted), call, reply in zip(self._submitted, self._calls, replies, strict=True):
            if isinstance(reply, Exception) and not of_another_type(reply):
                raise reply
            record = call.parse(reply)
            if record is not None:
                jobs[job_id] = _shown(record, max(0.0, self._now - submitted))
        return jobs
