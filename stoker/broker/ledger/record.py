"""The record of a job, `stoker:job:<job>`: every field that it has, and every read of it outside the scripts.

No other module names a field, and the scripts name no other than these (`tests/stoker/test_record.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import Any

from stoker.broker import keys
from stoker.broker.ledger.call import Call
from stoker.broker.ledger.replies import crashes
from stoker.contract.shown import printable


class Field(StrEnum):
    """The fields of the record. First what the client says when it submits the job."""

    KIND = "kind"
    MODEL = "model"
    QUEUE = "queue"
    CLIENT = "client"
    PRIORITY = "priority"
    #: What was asked, JSON. It goes when the job ends, as the message does.
    REQUEST = "request"
    MESSAGE = "message"
    #: The key of the job's input.
    BLOB = "blob"
    #: For people who watch: the adapter that it uses or makes, and how much it asks for ("250 texts").
    ADAPTER = "adapter"
    SIZE = "size"
    #: What its model must be able to do, where that is not the name of its kind: `rerank`.
    ABILITY = "ability"
    #: A digest of what the client's own client asked for; only where that may ask again under the same id.
    ASKED = "asked"
    #: Seconds from the submission after which nobody wants it any more; only where the client says so.
    DEADLINE = "deadline"
    #: The trace that the job belongs to, in the form of W3C's Trace Context; only of a client that traces.
    TRACEPARENT = "traceparent"
    TRACESTATE = "tracestate"

    #: Written by the scripts: when it was submitted, the key of its client's open jobs, its turn in the backlog, and
    #: the number of the last message that was made of it.
    SUBMITTED = "submitted"
    MINE = "mine"
    TURN = "turn"
    SENT = "sent"
    #: Who owns it: the owner's token, the tag of its delivery, and the worker. `BEGAN`: the token of the
    #: first one (`1` of an earlier release). `ATTEMPTS`: how many it has had.
    TOKEN = "token"
    TAG = "tag"
    WORKER = "worker"
    BEGAN = "began"
    ATTEMPTS = "attempts"
    #: The token of the owner that passed it on to another worker.
    PASSED = "passed"
    #: The worker that alone could run it when it was passed on last because its owner could not.
    NEEDS = "needs"
    #: The token of the owner that ended it, and of the one that made a dead letter of it.
    COMPLETED = "completed"
    LETTERED = "lettered"
    #: The owners that went silent, JSON; and what the next of them has to say of itself.
    HISTORY = "history"
    TROUBLE = "trouble"
    #: `1` behind its end; it has no message then.
    ENDED = "ended"
    #: How often it ended for want of memory, and the token of the owner that was counted last.
    OUT_OF_MEMORY = "out_of_memory"
    COUNTED = "counted"
    #: The version of the adapter that it uses or makes.
    VERSION = "version"
    #: What became of what it made: of vectors that they were `fetched`, of anything that it was `discarded`.
    VECTORS = "vectors"


@dataclass(frozen=True)
class NewJob(Mapping[str, str]):
    """What a client knows of a job when it submits it. As a mapping: the fields of the record."""

    kind: str
    model: str
    queue: str
    client: str
    priority: str
    request: str
    message: str
    blob: str = ""
    adapter: str = ""
    size: str = ""
    ability: str = ""
    asked: str = ""
    deadline: str = ""
    traceparent: str = ""
    tracestate: str = ""

    @cached_property
    def _given(self) -> dict[str, str]:
        return {name: str(value) for name in _NEW if (value := getattr(self, name))}

    def __getitem__(self, name: str) -> str:
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


#: A time as the scripts write it.
_PRIORITY = re.compile("[0-9]")
_TIME = re.compile(rb"[0-9]{1,12}\.[0-9]{1,6}")
_NEW = tuple(Field(field.name).value for field in fields(NewJob))


def addressed(new: Mapping[str, str]) -> tuple[str, str]:
    """The queue that a new job goes to, and its client."""
    return new[Field.QUEUE], new[Field.CLIENT]


@dataclass(frozen=True)
class Summary:
    """What there is to know of a job that may have ended. `kind` is None for one that the broker does not know.
    `ability`: what its model must be able to do; the kind's name in most cases. `client`: who has sent it; `asked`: a
    digest of what it was asked for; `deadline`: seconds from its submission."""

    kind: str | None
    queue: str | None
    owned: bool
    ability: str | None
    client: str | None = None
    asked: str | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Listed:
    """What a list of open jobs shows of one; `worker`: its owner."""

    kind: str
    model: str
    client: str
    priority: int
    worker: str | None


@dataclass(frozen=True)
class Watched:
    """What a monitor shows of a job; nothing of what was asked for. `worker`: its owner. `crashes`: owners before that
    went silent."""

    kind: str
    model: str
    client: str
    priority: int
    adapter: str
    size: str
    submitted: float
    worker: str | None
    crashes: int


def watched(job_id: str) -> Call[Watched | None]:
    """None for a record that has expired, and for one that no client wrote. A pipeline's reply may be an error."""
    names = (Field.ADAPTER, Field.SIZE, Field.SUBMITTED, Field.TOKEN, Field.HISTORY)
    return _read(job_id, _watched, Field.KIND, Field.MODEL, Field.CLIENT, Field.PRIORITY, Field.WORKER, *names)


def _watched(reply: Any) -> Watched | None:
    known = _listed(reply[:5]) if isinstance(reply, list) else None
    if known is None:
        return None
    adapter, size, submitted, token, history = map(_text, reply[5:])
    try:
        since = float(submitted or "")
    except ValueError:
        return None
    worker = known.worker if token is not None else None
    asked = (known.kind, known.model, known.client, known.priority, adapter or "", size or "")
    return Watched(*asked, submitted=since, worker=worker, crashes=_crashes(history))


def _crashes(history: str | None) -> int:
    try:
        return len(crashes(history or "[]"))
    except (ValueError, TypeError, RecursionError):
        return 0


def summary(job_id: str) -> Call[Summary]:
    names = (Field.CLIENT, Field.ASKED, Field.DEADLINE)
    return _read(job_id, _summary, Field.KIND, Field.QUEUE, Field.TOKEN, Field.ABILITY, *names)


def _summary(values: list[bytes | None]) -> Summary:
    kind, queue, token, ability, client, asked, deadline = values
    able = _text(kind if ability is None else ability)
    said = (_text(client), _text(asked), _seconds(deadline))
    return Summary(_text(kind), _text(queue), token is not None, able, *said)


def _seconds(value: bytes | None) -> float | None:
    """None where none are said, and for what no client wrote."""
    try:
        seconds = float(_text(value) or "")
    except ValueError:
        return None
    return seconds if 0 < seconds < float("inf") else None


def listed(job_id: str) -> Call[Listed | None]:
    """None for a record that has expired, and for one that no client wrote. A pipeline's reply may be an error."""
    return _read(job_id, _listed, Field.KIND, Field.MODEL, Field.CLIENT, Field.PRIORITY, Field.WORKER)


def _listed(values: Any) -> Listed | None:
    if not isinstance(values, list):
        return None
    kind, model, client, priority, worker = (value and printable(value) for value in map(_text, values))
    if kind is None or model is None or client is None or _PRIORITY.fullmatch(priority or "") is None:
        return None
    return Listed(kind, model, client, int(priority or ""), worker)


def begun(job_id: str) -> Call[bool]:
    """Whether the job has had an owner that began it, or has one. A record that has gone says no."""
    return _read(job_id, lambda reply: reply[0] is not None, Field.BEGAN)


def owner(job_id: str) -> Call[str | None]:
    """The token of the job's owner. A pipeline's reply may be an error, for a key of another type: nobody owns that."""
    return _read(job_id, lambda reply: _text(reply[0]) if isinstance(reply, list) else None, Field.TOKEN)


def open_since(job_id: str, queue: str) -> Call[float | None]:
    """When a job was submitted that is one of the queue's and has not ended; None for any other. A pipeline's reply may
    be an error."""

    def parse(reply: Any) -> float | None:
        if not isinstance(reply, list) or reply[0] != queue.encode() or reply[1] is None:
            return None
        submitted = reply[2] or b""
        return float(submitted) if _TIME.fullmatch(submitted) else None

    return _read(job_id, parse, Field.QUEUE, Field.MESSAGE, Field.SUBMITTED)


def version(job_id: str) -> Call[str | None]:
    """The version of its adapter, as it stands there."""
    return _read(job_id, lambda values: _text(values[0]), Field.VERSION)


def _read(job_id: str, parse: Any, *names: Field) -> Call[Any]:
    return Call(lambda redis: redis.hmget(keys.job(job_id), *names), parse)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")
