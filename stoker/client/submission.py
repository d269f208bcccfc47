"""One job on its way into the ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from stoker.broker import keys, ledger
from stoker.broker.envelope import envelope
from stoker.broker.ledger.call import Call
from stoker.broker.ledger.record import NewJob, Summary
from stoker.broker.ledger.replies import Submitted
from stoker.broker.pipeline import Pipeline, Pipelines
from stoker.contract import AdapterRequest, EmbedRequest, GenerateRequest, Request, TrainRequest, encode
from stoker.contract.dataset import ON_WORKER
from stoker.contract.uploads import Upload
from stoker.errors import InvalidRequest, QueueFull
from stoker.traces import NONE, Trace

if TYPE_CHECKING:
    from stoker.settings import Settings

P = TypeVar("P", bound=Pipeline)


class Submission:
    """One job on its way into the ledger. Sent again it is the same job, so a call that failed can be repeated."""

    def __init__(
        self,
        settings: Settings,
        request: Request,
        job_id: str,
        data: bytes = b"",
        client: str | None = None,
        trace: Trace = NONE,
        asked: str = "",
    ) -> None:
        """`client`: the key of the client that the job belongs to, if it is not the one of `settings`. `trace`: the
        one that it belongs to. `asked`: a digest of what it was asked for, which a job of its id has to have too."""
        self.job_id, self._data = job_id, data
        #: The request as it is sent: with the name of its input.
        self.request = _naming(request, job_id, data)
        self._record = job_record(self.request, job_id, client or settings.client_key, trace, asked)
        self._uploaded = False
        self._until = time.monotonic() + settings.queue_wait

    @property
    def in_parts(self) -> bool:
        """Whether its input is too large for the one command that sends the job."""
        return len(self._data) > keys.PART

    def uploads(self, redis: Pipelines[P]) -> Iterator[P]:
        """A pipeline for each part of the input, to be executed in order before the job is sent. A part that is sent
        again lands where it was. Until a job's record names it, what is there expires within minutes."""
        blob, self._data, data, self._uploaded = self._record.blob, b"", memoryview(self._data), True
        for start in range(0, len(data), keys.PART):
            pipeline = redis.pipeline()
            pipeline.setrange(blob, start, bytes(data[start : start + keys.PART]))
            pipeline.expire(blob, keys.UPLOAD_TTL)
            yield pipeline

    def check_known(self, known: Summary) -> None:
        """There was a job of this id before. Raises `InvalidRequest` if it cannot be the one meant."""
        if known.ability not in (None, self.request.ability):
            raise InvalidRequest(
                f"job_id: {self.job_id!r} given for a job of kind {self.request.ability}; it is that of a job of kind "
                f"{known.ability}. Take another id."
            )
        # What another client has asked for is not compared: it would say something of it.
        asked = self._record.asked if known.client == self._record.client else ""
        if asked and known.asked and asked != known.asked:
            raise InvalidRequest(
                f"job_id: {self.job_id!r} given for another request than it was given for before. Take another id, or "
                "send that request again as it was."
            )

    def tidy(self, pipeline: P, reply: Submitted) -> P:
        """Put into `pipeline` what a reply to `transition` asks for: an input that was uploaded in parts stays while
        the client waits for room in the queue, and goes if a job of that id was there already."""
        if self._uploaded and reply.state == "known":
            pipeline.unlink(self._record.blob)
        elif self._uploaded and reply.state != "new":
            pipeline.expire(self._record.blob, keys.UPLOAD_TTL)
        return pipeline

    def transition(self, *, revive: bool = False) -> Call[Submitted]:
        return ledger.submission(self.job_id, self._record, self._data, revive=revive)

    def pause(self, reply: Submitted) -> float | None:
        """None if the job is in; else seconds to wait before the next try. Raises `QueueFull` when time is up, and
        `InvalidRequest` for a job that is larger than all of a queue may be."""
        if reply.state == "too_large":
            raise InvalidRequest(
                f"{self._record.queue}: the job has {reply.depth} bytes with its input; all jobs of a queue together "
                f"may have {reply.limit}. Send less, or let the operator raise it: `stoker jobs policy queue_bytes`."
            )
        if not reply.is_full:
            return None
        left = self._until - time.monotonic()
        if left > 0:
            # A full queue moves on: looking more often than its pace says is cheap, sleeping too long is not.
            return min(left, reply.wait / 2, 5.0)
        raise QueueFull(self._refusal(reply), depth=reply.depth, limit=reply.limit, wait=reply.wait)

    def _refusal(self, reply: Submitted) -> str:
        client = self._record.client
        who = {
            "full": f"{reply.depth} jobs wait there and {reply.limit} may",
            "client_full": f"client {client!r} has {reply.depth} open jobs there and may have {reply.limit}",
            "bytes_full": f"the jobs there have {reply.depth} bytes and may have {reply.limit}",
        }
        if reply.state == "vectors_full":
            return (
                f"{self._record.queue}: vectors that wait to be fetched have {reply.depth} bytes and may have "
                f"{reply.limit}. Nothing was sent. Fetch those of jobs that are done (`result()`) or `discard()` them, "
                "set STOKER_QUEUE_WAIT to wait for room, or let the operator raise it: "
                "`stoker jobs policy vector_bytes`."
            )
        return (
            f"{self._record.queue}: {who[reply.state]}. Nothing was sent; try again in about {reply.wait:.0f} s, set "
            "STOKER_QUEUE_WAIT to wait for room, or start another worker."
        )


def _naming(request: Request, job_id: str, data: bytes) -> Request:
    """`request` with the name that its input is sent under, once that is known."""
    if isinstance(request, TrainRequest) and data:
        return request.model_copy(update={"dataset": str(Upload.of("dataset", job_id, data))})
    if isinstance(request, AdapterRequest) and data:
        return request.model_copy(update={"upload": str(Upload.of("adapter", job_id, data))})
    return request


def job_record(request: Request, job_id: str, client: str = "default", trace: Trace = NONE, asked: str = "") -> NewJob:
    """What `ledger.submit` writes: all that is known of the job, with the message that brings it to a worker."""
    queue = keys.queue(request.model, request.kind)
    return NewJob(
        kind=request.kind,
        model=request.model,
        queue=queue,
        client=client,
        priority=str(request.priority),
        request=json.dumps(encode(request)),
        message=envelope(job_id, request.kind, request.model, queue),
        blob=_input(request),
        adapter=_adapter(request),
        size=_size(request),
        ability="" if request.ability == request.kind else request.ability,
        asked=asked,
        deadline="" if request.deadline is None else repr(request.deadline),
        traceparent=trace.traceparent,
        tracestate=trace.tracestate,
    )


def _adapter(request: Request) -> str:
    if isinstance(request, GenerateRequest):
        return request.adapter or ""
    return "" if isinstance(request, EmbedRequest) else request.name


def _size(request: Request) -> str:
    """How much the job asks for, for people who watch it."""
    if isinstance(request, EmbedRequest):
        return f"{len(request.texts)} texts"
    if isinstance(request, GenerateRequest):
        return f"{request.max_tokens * request.n} tokens"
    if isinstance(request, TrainRequest):
        return f"{request.steps} steps" if request.epochs is None else f"{request.epochs} epochs"
    return ""


def _input(request: Request) -> str:
    """The key of what the request only names; "" for a request that is whole."""
    if isinstance(request, TrainRequest) and not request.dataset.startswith(ON_WORKER):
        return keys.blob(request.dataset)
    return keys.blob(request.upload) if isinstance(request, AdapterRequest) else ""
