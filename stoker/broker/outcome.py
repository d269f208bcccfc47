"""What a job's records in the broker say: where it is, how it ended, what it made. Read without trust."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from pydantic import ValidationError

from stoker.broker import keys
from stoker.broker.ledger.ending import DISCARDED
from stoker.broker.ledger.record import Summary
from stoker.contract import EmbedReply, vectors
from stoker.contract.base import Message
from stoker.contract.vectors import Encoded
from stoker.errors import JobCancelled, JobLost, from_wire

M = TypeVar("M", bound=Message)


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


_STATUS = {
    "SUCCESS": JobStatus.DONE,
    "FAILURE": JobStatus.FAILED,
    "REVOKED": JobStatus.CANCELLED,
}


@dataclass(frozen=True)
class Outcome:
    """A job's result record, as Celery stored it; a record of a job that has not ended gives none."""

    status: JobStatus
    value: Any = None

    @classmethod
    def parse(cls, record: bytes | None) -> Outcome | None:
        """None: it has not ended. Raises `JobLost` for a record that no worker wrote."""
        if record is None:
            return None
        try:
            fields = json.loads(record)
            status, value = str(fields["status"]), fields.get("result")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise spoiled("result", record) from None
        return cls(_STATUS[status], value) if status in _STATUS else None

    @property
    def tokens(self) -> int:
        """How many tokens a generation that is done has published; 0 for what is none."""
        usage = self.value.get("usage") if isinstance(self.value, dict) else None
        made = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return made if self.status is JobStatus.DONE and isinstance(made, int) else 0

    def unwrap(self, job_id: str) -> Any:
        """The value of a job that is done; raises what the worker raised, or `JobCancelled`."""
        if self.status is JobStatus.CANCELLED:
            raise JobCancelled(f"job {job_id} was cancelled.")
        if self.status is JobStatus.FAILED:
            report = self.value if isinstance(self.value, dict) else {}
            raise from_wire(str(report.get("exc_type", "unknown")), _as_text(report.get("exc_message", "")))
        if self.value == DISCARDED:
            raise JobLost(
                f"job {job_id} is done, and `discard()` took what it made out of the broker. Send it again under "
                "another id."
            )
        return self.value


def _as_text(message: Any) -> str:
    return " ".join(map(str, message)) if isinstance(message, list | tuple) else str(message)


def announced(record: bytes) -> Outcome | None:
    """What the channel of results said; None where only the record itself can say."""
    try:
        return Outcome.parse(record)
    except JobLost:
        return None


def result_as(kind: type[M], value: Any) -> M:
    """What a job made, from its record. Raises `JobLost` for something else."""
    try:
        return kind.model_validate(value)
    except ValidationError:
        raise spoiled("result", json.dumps(value).encode()) from None


def status_of(result: bytes | None, known: Summary, job_id: str) -> JobStatus:
    """Raises `JobLost` for a job that is neither known nor ended."""
    outcome = Outcome.parse(result)
    if outcome is not None:
        return outcome.status
    if known.kind is None:
        raise lost(job_id)
    return JobStatus.RUNNING if known.owned else JobStatus.QUEUED


def vectors_reply(job_id: str, value: Any) -> EmbedReply:
    """What an embedding job made. Raises `JobLost` for something else, and for one that names another job's vectors."""
    reply = result_as(EmbedReply, value)
    if reply.blob != keys.vectors(job_id):
        raise spoiled("result", reply.blob.encode(errors="replace"))
    return reply


def read_vectors(reply: EmbedReply, data: bytes | None, became: str = "") -> Encoded:
    """(rows, dim) in the dtype that was asked for; a blob that expired, or holds something else, raises `JobLost`.
    `became`: what the job's record says of them."""
    if data is None:
        hours, minutes = keys.RESULT_TTL // 3600, keys.FETCHED_TTL // 60
        why = {
            "fetched": f"they were fetched before, and from then on they are kept {minutes} minutes, or until others "
            "need their room. Keep what the first `result()` returned, or send the job again",
            "discarded": "`discard()` took them out of the broker. Send the job again",
        }
        raise JobLost(
            f"the vectors of blob {reply.blob} are gone: {why.get(became, f'results are kept {hours} hours')}."
        )
    try:
        found = vectors.load(data)
    except ValueError:
        raise spoiled("vectors", data) from None
    if not vectors.is_of(found, reply.rows, reply.dim, reply.dtype):
        raise spoiled("vectors", data)
    return found


def lost(job_id: str) -> JobLost:
    return JobLost(
        f"the broker knows nothing of job {job_id}: it ended over {keys.RESULT_TTL // 3600} hours ago (less, "
        "where `stoker jobs policy result_seconds` says so), "
        "or the broker lost its data. Send the job again."
    )


def spoiled(what: str, raw: bytes) -> JobLost:
    """The error for something in the broker that neither a client nor a worker wrote."""
    shown = repr(raw if len(raw) <= 60 else raw[:60] + b"...")
    return JobLost(
        f"the job's {what} cannot be read: the broker holds {shown}, which Stoker did not write. Send it again."
    )
