"""What the scripts answer, each read in one function."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Self


@dataclass(frozen=True)
class Submitted:
    """`state`: `new`, `known`, `full`, `client_full`, `bytes_full`, `vectors_full`, `too_large`, or `unknown` for no
    dead letter. Of a queue that is full: the `depth` there is and its `limit`, of all clients or of this one, in jobs
    or in bytes, and the seconds to `wait` before another try; of a broker that is full of vectors, their bytes. Of a
    job that is too large: its bytes and the limit."""

    state: str
    depth: int = 0
    limit: int = 0
    wait: float = 0.0

    @classmethod
    def parse(cls, reply: list[bytes]) -> Submitted:
        state, depth, limit, wait = reply
        return cls(state.decode(), int(depth), int(limit), float(wait))

    @property
    def is_full(self) -> bool:
        return self.state in ("full", "client_full", "bytes_full", "vectors_full")


@dataclass(frozen=True)
class Claim:
    """`state`: `run`, `ended`, `duplicate`, `unknown`, `spoiled` or `dead`. `age`: seconds since submission.
    `resumed`: it had an owner before. `request`: what was asked, JSON. `cancelled`: a client asked for its end
    before. `client`: the key of the client that sent it. `attempt`: how many owners it has had, this one included.
    `traceparent`, `tracestate`: the trace that it belongs to, as its client wrote them; "" for none. `submitted`: when
    it was, by the broker's clock, in seconds since the epoch; None for one that does not run. `passed`: an owner has
    passed it on, as if it had not been."""

    state: str
    age: float
    resumed: bool
    request: str = ""
    cancelled: bool = False
    client: str = ""
    attempt: int = 1
    traceparent: str = ""
    tracestate: str = ""
    submitted: float | None = None
    passed: bool = False

    @classmethod
    def parse(cls, reply: list[bytes]) -> Claim:
        state, age, resumed, request, *more = reply
        # Bytes that are no text become what is no JSON: the job ends with an error that says so.
        asked = request.decode(errors="backslashreplace")
        # By a new primary whose clock is behind, a job may come from the future.
        claim = (state.decode(), max(0.0, float(age)), resumed == b"1", asked)
        if not more:
            return cls(*claim)
        texts = [text.decode(errors="replace") for text in more]
        cancelled, client, attempt, traceparent, tracestate, submitted, passed = texts
        trace = (traceparent, tracestate)
        return cls(*claim, cancelled == "1", client, int(attempt), *trace, float(submitted), passed == "1")


class _Word(StrEnum):
    """What a script answers with one word."""

    @classmethod
    def parse(cls, reply: bytes) -> Self:
        return cls(reply.decode())


class Passing(_Word):
    """What became of a job that its owner wanted to pass on: `STAYS` if it may not be, and its owner keeps it."""

    PASSED = "passed"
    STAYS = "stays"
    FENCED = "fenced"


@dataclass(frozen=True)
class Crash:
    """An owner that went silent, or gave the job up for `trouble`. `time`: the broker's."""

    worker: str
    time: float
    trouble: str | None = None


@dataclass(frozen=True)
class DeadLettered:
    """`history`: what the letter says of the job's owners. Of an owner that was `fenced`, nothing was written."""

    fenced: bool
    history: tuple[Crash, ...] = ()

    @classmethod
    def parse(cls, reply: bytes | None) -> DeadLettered:
        return cls(True) if reply is None else cls(False, crashes(reply))


@dataclass(frozen=True)
class KeptPart:
    """Whether a part of a checkpoint was kept. If there was no room: the bytes that the queue's jobs have, and how many
    of them there may be with checkpoints. Of an owner that was `fenced`, nothing was written."""

    there: bool
    bytes: int = 0
    limit: int = 0
    fenced: bool = False

    @classmethod
    def parse(cls, reply: list[int] | None) -> KeptPart:
        if reply is None:
            return cls(False, fenced=True)
        there, found, limit = reply
        return cls(there == 1, found, limit)


class ManifestState(_Word):
    """What became of a manifest: `LOST` if a part that it needs is not there."""

    KEPT = "kept"
    LOST = "lost"
    FENCED = "fenced"


def crashes(text: bytes | str) -> tuple[Crash, ...]:
    """A history, as a record or a letter has it. What no script wrote there is left out."""
    entries = [entry for entry in json.loads(text) if isinstance(entry, dict) and isinstance(entry.get("worker"), str)]
    return tuple(Crash(entry["worker"], entry.get("time", 0.0), entry.get("trouble")) for entry in entries)


def recovered(reply: list[bytes]) -> tuple[str, ...]:
    """The jobs that wait again."""
    return tuple(job_id.decode(errors="replace") for job_id in reply)
