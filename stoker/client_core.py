"""What `Client` and `AsyncClient` have in common: everything except the waiting."""

from __future__ import annotations

import json
import os
import secrets
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from stoker import keys, ledger
from stoker.catalogue import model_name
from stoker.contract import (
    CONTRACT,
    AdapterRequest,
    EmbedReply,
    EmbedRequest,
    GenerateRequest,
    ModelCard,
    Presence,
    Request,
    TrainRequest,
    build,
    encode,
    vectors,
)
from stoker.contract.base import Message
from stoker.contract.dataset import ON_WORKER, iterate_lines, iterate_mappings, to_lines
from stoker.contract.names import Rule, checked
from stoker.contract.uploads import Upload
from stoker.contract.vectors import Encoded
from stoker.envelope import envelope
from stoker.errors import (
    DatasetError,
    InvalidRequest,
    JobCancelled,
    JobLost,
    QueueFull,
    UnknownModel,
    from_wire,
)
from stoker.ledger.call import Call
from stoker.ledger.record import NewJob, Summary
from stoker.ledger.replies import Submitted
from stoker.settings import Settings, load_settings

#: What `dataset` may be: a file of JSON lines, `worker:NAME` for one under the worker's data root, or the examples.
Dataset = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
#: What `generate` continues: a text, token ids, or messages such as `{"role": "user", "content": "Hello"}`.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


REQUESTS: dict[str, type[Request]] = {
    request.kind: request for request in (EmbedRequest, GenerateRequest, TrainRequest, AdapterRequest)
}


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
    """A job's result record, as Celery stored it; none is read from one of a job that has not ended."""

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

    def unwrap(self, job_id: str) -> Any:
        """The value of a job that is done; raises what the worker raised, or `JobCancelled`."""
        if self.status is JobStatus.CANCELLED:
            raise JobCancelled(f"job {job_id} was cancelled.")
        if self.status is JobStatus.FAILED:
            told = self.value if isinstance(self.value, dict) else {}
            raise from_wire(str(told.get("exc_type", "unknown")), _joined(told.get("exc_message", "")))
        return self.value


def _joined(message: Any) -> str:
    return " ".join(map(str, message)) if isinstance(message, list | tuple) else str(message)


def announced(record: bytes) -> Outcome | None:
    """What the channel of results said; None if a look at the record itself has to tell."""
    try:
        return Outcome.parse(record)
    except JobLost:
        return None


M = TypeVar("M", bound=Message)


def result_as(kind: type[M], value: Any) -> M:
    """What a job made, from its record. Raises `JobLost` for something else."""
    try:
        return kind.model_validate(value)
    except ValidationError:
        raise spoiled("result", json.dumps(value).encode()) from None


def known_kind(job_id: str, kind: str | None) -> str:
    """The kind that a job's record says. Raises `JobLost` if there is no record, and for one that no client wrote."""
    if kind is None:
        raise lost(job_id)
    if kind not in REQUESTS:
        raise spoiled(f"record (kind {kind[:40]!r}) of job {job_id}", kind.encode())
    return kind


def spoiled(what: str, raw: bytes) -> JobLost:
    """Of something in the broker that neither a client nor a worker wrote."""
    shown = repr(raw if len(raw) <= 60 else raw[:60] + b"...")
    return JobLost(
        f"the job's {what} cannot be read: the broker holds {shown}, which Stoker did not write. Send it again."
    )


def checked_job_id(job_id: str | None) -> str:
    """The caller's id, or a new one. Raises `InvalidRequest` for one that could be taken for something else."""
    if job_id is None:
        return str(uuid.uuid4())
    return checked(Rule.JOB_ID, "job_id", job_id)


def draw_seed() -> int:
    return secrets.randbelow(2**63)


def embed_request(model: str, texts: Sequence[str], fields: Mapping[str, Any]) -> EmbedRequest:
    if isinstance(texts, str):
        raise InvalidRequest("texts: one text given; expected a list of texts, such as ['a warm model'].")
    if not isinstance(texts, Iterable):
        raise InvalidRequest(f"texts: a {type(texts).__name__} given; expected a list of texts.")
    return build(EmbedRequest, {"model": model, "texts": tuple(texts), **fields})


def generate_request(model: str, prompt: Prompt | None, seed: int | None, fields: Mapping[str, Any]) -> GenerateRequest:
    """`prompt`: a text, token ids, or the messages of a conversation; None if `fields` have one of them by name."""
    seed = draw_seed() if seed is None else seed
    return build(GenerateRequest, {"model": model, "seed": seed, **_prompt_fields(prompt), **fields})


def _prompt_fields(prompt: Prompt | None) -> dict[str, Any]:
    if prompt is None or isinstance(prompt, str):
        return {} if prompt is None else {"prompt": prompt}
    if not isinstance(prompt, Iterable):
        raise InvalidRequest(
            f"prompt: a {type(prompt).__name__} given; expected a text, a list of token ids, or a list of messages."
        )
    items = tuple(prompt)
    return {"prompt_ids" if items and isinstance(items[0], int) else "messages": items}


def train_request(model: str, name: str, dataset: Dataset, job_id: str, fields: Mapping[str, Any]) -> TrainRequest:
    source = dataset if _on_worker(dataset) else str(Upload.of("dataset", job_id, b""))
    return build(TrainRequest, {"model": model, "name": name, "dataset": source, **fields})


def adapter_request(model: str, name: str, job_id: str, fields: Mapping[str, Any]) -> AdapterRequest:
    upload = str(Upload.of("adapter", job_id, b""))
    return build(AdapterRequest, {"model": model, "name": name, "upload": upload, **fields})


def _naming(request: Request, job_id: str, data: bytes) -> Request:
    """`request` with the name that its input is sent under, once that is known."""
    if isinstance(request, TrainRequest) and data:
        return request.model_copy(update={"dataset": str(Upload.of("dataset", job_id, data))})
    if isinstance(request, AdapterRequest) and data:
        return request.model_copy(update={"upload": str(Upload.of("adapter", job_id, data))})
    return request


def _on_worker(dataset: Dataset) -> bool:
    return isinstance(dataset, str) and dataset.startswith(ON_WORKER)


def read_dataset(dataset: Dataset) -> bytes:
    """The dataset as it is uploaded; empty for one that the worker has. A bad line raises `DatasetError` with its
    number."""
    if _on_worker(dataset):
        return b""
    if not isinstance(dataset, str | os.PathLike | Iterable):
        raise DatasetError(f"dataset: a {type(dataset).__name__} given; expected a path, or a list of examples.")
    if not isinstance(dataset, str | os.PathLike):
        return to_lines(iterate_mappings(dataset, "dataset"), "dataset")
    path = Path(dataset)
    try:
        with path.open("rb") as file:
            return to_lines(iterate_lines(file, path.name), path.name)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}).") from None


class Submission:
    """One job on its way into the ledger. Sent again it is the same job, so any failure of the way can be repeated."""

    def __init__(
        self, settings: Settings, request: Request, job_id: str, data: bytes = b"", client: str | None = None
    ) -> None:
        """`client`: the key of the client that the job belongs to, if it is not the one of `settings`."""
        self.job_id, self._data = job_id, data
        self._record = job_record(_naming(request, job_id, data), job_id, client or settings.client_key)
        self._uploaded = False
        self._until = time.monotonic() + settings.queue_wait

    @property
    def in_parts(self) -> bool:
        """Whether its input is too large for the one command that sends the job."""
        return len(self._data) > keys.PART

    def uploads(self, redis: Any) -> Iterator[Any]:
        """A pipeline for each part of the input, to be executed in order before the job is sent. A part that is sent
        again lands where it was. Until a job's record names it, what is there expires within minutes."""
        blob, self._data, data, self._uploaded = self._record.blob, b"", memoryview(self._data), True
        for start in range(0, len(data), keys.PART):
            pipeline = redis.pipeline()
            pipeline.setrange(blob, start, bytes(data[start : start + keys.PART]))
            pipeline.expire(blob, keys.UPLOAD_TTL)
            yield pipeline

    def check_known(self, kind: str | None) -> None:
        """There was a job of this id before, of this `kind`. Raises `InvalidRequest` if it cannot be the one meant."""
        if kind not in (None, self._record.kind):
            raise InvalidRequest(
                f"job_id: {self.job_id!r} given for a job of kind {self._record.kind}; it is that of a job of kind "
                f"{kind}. Take another id."
            )

    def tidy(self, pipeline: Any, reply: Submitted) -> Any:
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
        """None if the job is in; else seconds to wait before the next try. Raises `QueueFull` when time is up."""
        if not reply.is_full:
            return None
        left = self._until - time.monotonic()
        if left > 0:
            # A full queue moves on: looking more often than its pace says is cheap, sleeping too long is not.
            return min(left, reply.wait / 2, 5.0)
        raise QueueFull(self._refusal(reply), depth=reply.depth, limit=reply.limit, wait=reply.wait)

    def _refusal(self, reply: Submitted) -> str:
        who = (
            f"{reply.depth} jobs wait there and {reply.limit} may"
            if reply.state == "full"
            else f"client {self._record.client!r} has {reply.depth} open jobs there and may have {reply.limit}"
        )
        return (
            f"{self._record.queue}: {who}. Nothing was sent; try again in about {reply.wait:.0f} s, set "
            "STOKER_QUEUE_WAIT to wait for a place, or start another worker."
        )


def job_record(request: Request, job_id: str, client: str = "default") -> NewJob:
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
    )


def _input(request: Request) -> str:
    """The key of what the request only names; "" for a request that is whole."""
    if isinstance(request, TrainRequest) and not request.dataset.startswith(ON_WORKER):
        return keys.blob(request.dataset)
    return keys.blob(request.upload) if isinstance(request, AdapterRequest) else ""


def status_of(result: bytes | None, known: Summary, job_id: str) -> JobStatus:
    """Raises `JobLost` for a job that is neither known nor ended."""
    outcome = Outcome.parse(result)
    if outcome is not None:
        return outcome.status
    if known.kind is None:
        raise lost(job_id)
    return JobStatus.RUNNING if known.owned else JobStatus.QUEUED


def parse_cards(raw: Mapping[bytes, bytes]) -> dict[str, ModelCard]:
    """The cards of models that were served lately; the hash as a whole lives as long as any of them is.

    Of two generations of workers the one that this client understands counts.
    """
    oldest = time.time() - keys.MODEL_TTL
    cards = [card for card in _readable(ModelCard, raw.values()) if card.seen >= oldest]
    return {card.model: card for card in sorted(cards, key=lambda card: card.contract == CONTRACT)}


def parse_presences(raw: Iterable[bytes | None]) -> list[Presence]:
    return _readable(Presence, raw)


N = TypeVar("N", ModelCard, Presence)


def _readable(notice: type[N], raw: Iterable[bytes | None]) -> list[N]:
    """Without those that have expired, and those of a release that says it in another way."""
    found = []
    for value in raw:
        with suppress(ValidationError):
            found += [notice.model_validate_json(value)] if value is not None else []
    return found


def choose_model(model: str | None, kind: str, known: Mapping[str, ModelCard], workers: Sequence[Presence]) -> str:
    """The model to send to: the one asked for, if some worker serves or lately served it, or the only one warm.

    A path stands for the name that a worker started with it gives it. A model that was served lately but is not warm
    now is accepted: its worker may be restarting, and the job waits. Not so if workers of another generation serve it
    by now: the job might wait for ever.
    """
    cards = [card for worker in workers for card in worker.models if kind in card.kinds]
    warm = {card.model for card in cards if card.contract == CONTRACT}
    if model is None:
        if len(warm) == 1:
            return warm.pop()
        raise UnknownModel(
            f"no model given, and {_listed(warm)} can {kind}. "
            + ("Name one with model=…." if warm else "Start a worker with `stoker up`.")
        )
    model = model_name(model)
    if model not in known:
        raise UnknownModel(f"model {model!r} given; {_listed(warm)} can {kind}. {_how_to_serve(model)}")
    others = {card.contract for card in cards if card.model == model and model not in warm}
    if others or known[model].contract != CONTRACT:
        spoken = max(others, default=known[model].contract)
        raise UnknownModel(
            f"model {model!r} is served by workers that speak version {spoken} of the contract alone; "
            f"this client speaks version {CONTRACT}. Run the same release of Stoker on both sides."
        )
    if kind not in known[model].kinds:
        able = " and ".join(known[model].kinds)
        raise UnknownModel(f"model {model!r} cannot {kind}: it can {able}; {_listed(warm)} can {kind}.")
    return model


class Choices:
    """What `choose_model` said lately, so that a client that sends many jobs asks no more often than workers speak."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str | None, str], tuple[str, float]] = {}

    def get(self, model: str | None, kind: str) -> str | None:
        chosen, until = self._kept.get((model, kind), ("", 0.0))
        return chosen if time.monotonic() < until else None

    def keep(self, model: str | None, kind: str, chosen: str) -> str:
        if self.get(model, kind) is None:
            self._kept[model, kind] = (chosen, time.monotonic() + keys.PRESENCE_EVERY)
        return chosen


def _listed(models: Iterable[str]) -> str:
    names = sorted(models)
    return f"of the models warm now {', '.join(names)}" if names else "no model that is warm now"


def _how_to_serve(model: str) -> str:
    return f"Start a worker that serves it: `stoker worker --model {model}`."


def read_vectors(reply: EmbedReply, data: bytes | None) -> Encoded:
    """(rows, dim) in the dtype that was asked for; a blob that expired raises `JobLost`."""
    if data is None:
        raise JobLost(f"the vectors of blob {reply.blob} are gone: results are kept {keys.RESULT_TTL // 3600} hours.")
    return vectors.load(data)


def settings_at(address: str) -> Settings:
    """The settings of this process; with the broker at `address` where they choose none."""
    settings = load_settings()
    return settings if settings.chosen_url is not None else load_settings(url=address)


def lost(job_id: str) -> JobLost:
    return JobLost(
        f"the broker knows nothing of job {job_id}: it ended over {keys.RESULT_TTL // 3600} hours ago, "
        "or the broker lost its data. Send the job again."
    )
