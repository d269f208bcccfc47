"""The broker and the worker of an in-memory client: its jobs, and what has become of each."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from stoker.adapters import existing
from stoker.broker import keys
from stoker.broker.ledger.ending import DISCARDED
from stoker.broker.ledger.listing import OpenJob
from stoker.broker.ledger.record import Summary
from stoker.broker.letters import Letter
from stoker.broker.outcome import JobStatus, Outcome, lost
from stoker.client.in_memory.adapters import Registry
from stoker.client.in_memory.answers import (
    USAGE,
    WORKER,
    Answer,
    EmbedAnswer,
    GenerateAnswer,
    RerankAnswer,
    TrainAnswer,
    generated,
    trained,
)
from stoker.client.in_memory.models import Models
from stoker.client.in_memory.prefixes import Prefixes
from stoker.client.in_memory.script import Script
from stoker.client.in_memory.sent import Sent, SentJob, travelled
from stoker.client.submission import Submission
from stoker.contract import (
    AdapterResult,
    EmbedReply,
    EmbedRequest,
    GenerateRequest,
    ModelCard,
    Presence,
    Request,
    StreamToken,
    TrainReport,
    TrainRequest,
    encode,
)
from stoker.contract.base import Message, parse_adapter
from stoker.contract.control import ModelCommand, ModelReport
from stoker.contract.names import Rule, checked
from stoker.contract.vectors import Encoded, Int8Vectors, load
from stoker.errors import DeadlineExceeded, JobDead, StokerError, UnknownAdapter
from stoker.settings import Settings

R = TypeVar("R", bound=Request)

Entry = StreamToken | TrainReport


@dataclass
class _Job:
    sent: SentJob
    answer: Answer
    entries: tuple[Entry, ...]
    blob: bytes | None
    #: By the memory's clock.
    submitted: float
    status: JobStatus = JobStatus.QUEUED
    #: Entries that were made: those that were asked for, and all once the job has ended.
    made: int = 0
    error: StokerError | None = None
    outcome: Outcome | None = None
    #: A digest of what it was asked for.
    asked: str = ""

    @property
    def due(self) -> float | None:
        """When its deadline ends it; None for one without, and for one that does not hang, because it takes no time."""
        deadline = self.sent.request.deadline
        return self.submitted + deadline if self.answer.ending.hangs and deadline is not None else None

    @property
    def summary(self) -> Summary:
        request = self.sent.request
        queue = keys.queue(request.model, request.kind)
        return Summary(request.kind, queue, False, request.ability, self.sent.client, self.asked)


class Memory:
    """A job is queued until it is waited for or its stream is read; it runs as far as it is read, and then it ends."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Iterable[str]] | None = None,
        adapters: Iterable[str] = (),
        may_load: Mapping[str, Iterable[str]] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`adapters`: names that have a version 1, which serves, at each model that generates. `clock`: seconds, by
        which deadlines pass; None: real ones."""
        self.settings, self.script, self.registry = settings, Script(), Registry()
        self.sent, self.prefixes = Sent(), Prefixes()
        self._models = Models(models, may_load or {}, self._running, self._refuse)
        self._jobs: dict[str, _Job] = {}
        self._blobs: dict[str, bytes] = {}
        self._clock = clock or time.monotonic
        self._lock = threading.RLock()
        for name in adapters:
            checked(Rule.NAME, "adapters", name)
            for card in self._models.warm:
                if "generate" in card.kinds:
                    self.registry.register(card.model, name, {"method": "lora", "rank": 8}, promote=True)

    def submit(self, request: Request, job_id: str, data: bytes, client: str, asked: str = "") -> None:
        """Take a job in. An id that is known already is the same job, as at a broker."""
        with self._lock:
            submission = Submission(self.settings, request, job_id, data, client, asked=asked)
            refusal = self.script.refusal()
            if refusal is not None:
                raise refusal
            if job_id in self._jobs:
                submission.check_known(self._jobs[job_id].summary)
                return
            self._take(SentJob(job_id, travelled(submission.request), data, client), asked)

    def revive(self, request: Request, job_id: str, client: str | None) -> None:
        """Take a dead job in again; it gets the next answer."""
        with self._lock:
            data, sender = self.job(job_id).sent.data, client or self.settings.client_key
            self._take(SentJob(job_id, travelled(request), data, sender))

    def _take(self, sent: SentJob, asked: str = "") -> None:
        answer = self.script.answer(sent.request.ability)
        self._jobs[sent.job_id] = _Job(sent, answer, *_made(sent.request, answer), self._clock(), asked=asked)
        self.sent.jobs.append(sent)

    def job(self, job_id: str) -> _Job:
        """The job, as it is now. Raises `JobLost`."""
        if job_id not in self._jobs:
            raise lost(job_id)
        with self._lock:
            job = self._jobs[job_id]
            if self._is_late(job):
                self._run(job)
            return job

    def _is_late(self, job: _Job) -> bool:
        return job.due is not None and self._clock() >= job.due

    def time_left(self, job_id: str) -> float | None:
        """Seconds until the deadline of a job that hangs; None where it has none."""
        due = self.job(job_id).due
        return None if due is None else due - self._clock()

    def ability(self, job_id: str) -> str | None:
        return self._jobs[job_id].sent.request.ability if job_id in self._jobs else None

    def sender(self, job_id: str) -> str | None:
        return self._jobs[job_id].sent.client if job_id in self._jobs else None

    def cancel(self, job_id: str) -> None:
        with self._lock:
            job = self.job(job_id)
            if job.outcome is None:
                job.status, job.outcome = JobStatus.CANCELLED, Outcome(JobStatus.CANCELLED)

    def entry(self, job_id: str, index: int) -> Entry | None:
        """Let the job make this entry of its stream; None where there is none."""
        with self._lock:
            job = self.job(job_id)
            self._begin(job)
            if job.outcome is None and index < len(job.entries):
                job.made = max(job.made, index + 1)
            return job.entries[index] if index < job.made else None

    def end(self, job_id: str) -> Outcome | None:
        """Let the job run to its end, and say how it ended. None for one that hangs, until its deadline."""
        with self._lock:
            job = self.job(job_id)
            self._run(job)
            return job.outcome

    def _run(self, job: _Job) -> None:
        self._begin(job)
        if job.outcome is None:
            job.made = len(job.entries)
            job.outcome = self._outcome(job)
        if job.outcome is not None:
            job.status = job.outcome.status

    def _begin(self, job: _Job) -> None:
        if job.status is JobStatus.QUEUED:
            job.status, job.error = JobStatus.RUNNING, self._unknown_adapter(job.sent.request)
            if job.error is not None:
                job.entries = ()

    def _outcome(self, job: _Job) -> Outcome | None:
        late = DeadlineExceeded(f"job {job.sent.job_id} was stopped at its deadline.") if self._is_late(job) else None
        error = job.error or job.answer.ending.error or late
        if error is not None:
            return Outcome(JobStatus.FAILED, {"exc_type": type(error).__name__, "exc_message": str(error)})
        if job.answer.ending.hangs:
            return None
        return Outcome(JobStatus.DONE, self._value(job).model_dump(mode="json"))

    def _unknown_adapter(self, request: Request) -> StokerError | None:
        """A worker looks the adapter up when it begins."""
        if not isinstance(request, GenerateRequest) or request.adapter is None:
            return None
        try:
            name, version = parse_adapter(request.adapter)
            existing(self.registry.get(request.model, name)).version(version)
        except UnknownAdapter as error:
            return error
        return None

    def _value(self, job: _Job) -> Message:
        request = job.sent.request
        if isinstance(request, EmbedRequest):
            name, data = keys.vectors(job.sent.job_id), job.blob or b""
            self._blobs[name], (rows, dim) = data, _shape(load(data))
            return EmbedReply(blob=name, rows=rows, dim=dim, dtype=request.dtype, usage=USAGE)
        if isinstance(request, GenerateRequest):
            return generated(request, [entry for entry in job.entries if isinstance(entry, StreamToken)])
        known = {"method": "lora", "rank": request.rank if isinstance(request, TrainRequest) else 8}
        version = self.registry.register(request.model, request.name, known, promote=request.promote)
        if isinstance(request, TrainRequest):
            return trained(request, version, [entry for entry in job.entries if isinstance(entry, TrainReport)])
        return AdapterResult(
            model=request.model, adapter=request.name, version=version, rank=8, method="lora", usage=USAGE
        )

    def blob(self, name: str) -> bytes | None:
        """The vectors of a job; None once they are discarded."""
        return self._blobs.get(name)

    def discard(self, job_id: str) -> None:
        with self._lock:
            self._blobs.pop(keys.vectors(job_id), None)
            job = self.job(job_id)
            if job.outcome is not None and job.status is JobStatus.DONE:
                job.entries, job.made, job.outcome = (), 0, Outcome(job.status, DISCARDED)

    def models(self) -> dict[str, ModelCard]:
        return self._models.known

    def command(self, worker: str, command: ModelCommand) -> ModelReport:
        """What a worker is asked about its models."""
        with self._lock:
            return self._models.follow(command)

    def _running(self, model: str) -> int:
        return sum(job.sent.request.model == model and job.status is JobStatus.RUNNING for job in self._open().values())

    def _open(self) -> dict[str, _Job]:
        """Those that have not ended, oldest first."""
        return {job_id: job for job_id in list(self._jobs) if (job := self.job(job_id)).outcome is None}

    def _refuse(self, model: str, error: StokerError) -> None:
        """End the jobs that wait for a model which nobody holds."""
        for job in self._open().values():
            if job.sent.request.model == model:
                fields = {"exc_type": type(error).__name__, "exc_message": str(error)}
                job.status, job.outcome = JobStatus.FAILED, Outcome(JobStatus.FAILED, fields)

    def workers(self) -> list[Presence]:
        """One worker, which holds every model that is warm."""
        now = time.time()
        return [
            Presence(
                worker=WORKER, host="localhost", pid=os.getpid(), device="memory", started=now, time=now,
                models=self._models.warm, adapters={}, lanes={}, memory_bytes=0,
                states=self._models.states, prefixes=self.prefixes.states,
            )
        ]  # fmt: skip

    def jobs(self) -> dict[str, OpenJob]:
        """Those that have not ended, oldest first."""
        return {job_id: _listed(job, self._clock()) for job_id, job in self._open().items()}

    def dead(self) -> dict[str, Letter]:
        """Jobs whose answer ends with `JobDead`."""
        return {
            job_id: _letter(job.sent) for job_id, job in self._jobs.items()
            if job.outcome is not None and isinstance(job.answer.ending.error, JobDead)
        }  # fmt: skip


def _made(request: Request, answer: Answer) -> tuple[tuple[Entry, ...], bytes | None]:
    """The entries of the job's stream, and its vectors."""
    if isinstance(request, EmbedRequest) and isinstance(answer, EmbedAnswer | RerankAnswer):
        return (), answer.blob(request)
    if isinstance(request, GenerateRequest) and isinstance(answer, GenerateAnswer):
        return answer.tokens(request), None
    if isinstance(request, TrainRequest) and isinstance(answer, TrainAnswer):
        return answer.reports(request), None
    return (), None


def _shape(encoded: Encoded) -> tuple[int, int]:
    rows, dim = (encoded.codes if isinstance(encoded, Int8Vectors) else encoded).shape
    return rows, dim


def _listed(job: _Job, now: float) -> OpenJob:
    request = job.sent.request
    listed = OpenJob(
        kind=request.kind, model=request.model, client=job.sent.client, priority=request.priority,
        age=now - job.submitted,
    )  # fmt: skip
    return OpenJob(**listed, worker=WORKER) if job.status is JobStatus.RUNNING else listed


def _letter(sent: SentJob) -> Letter:
    asked = json.dumps(encode(sent.request))
    return Letter(
        kind=sent.request.kind, model=sent.request.model, request=asked, client=sent.client,
        history=[{"worker": WORKER, "time": time.time()}],
    )  # fmt: skip
