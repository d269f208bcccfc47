"""Vectors on their way from a worker to a client: for a day, or until some minutes after a client has fetched them.

There is a limit on their bytes (`stoker jobs policy vector_bytes`). Where they reach it, those that were fetched go,
the oldest first; those that nobody has fetched stay, and no further job is taken (`submit.lua`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from stoker.broker import keys
from stoker.broker.ledger.call import Call
from stoker.broker.ledger.transitions import TRANSITIONS

#: Bytes that vectors may have in the broker, unless the policy says otherwise.
VECTOR_BYTES = 2**30


@dataclass(frozen=True)
class Kept:
    """Whether there was room; the `bytes` that other vectors have, and the `limit` of all."""

    there: bool
    bytes: int
    limit: int

    @classmethod
    def parse(cls, reply: list[int]) -> Kept:
        there, found, limit = reply
        return cls(there == 1, found, limit)


@dataclass(frozen=True)
class Fetched:
    """`data`: None for vectors that are gone; `became`: what of them, `fetched` or `discarded`, where that is known."""

    data: bytes | None
    became: str = ""

    @classmethod
    def parse(cls, reply: list[bytes | None]) -> Fetched:
        data, became = reply
        return cls(data, "" if became is None else became.decode(errors="replace"))


def names(job_id: str) -> list[str]:
    own = [keys.job(job_id), keys.blob(keys.vectors(job_id))]
    return [*own, keys.POLICY, keys.VECTORS_UNFETCHED, keys.VECTORS_FETCHED, keys.VECTORS_SIZES]


def keep(redis: Any, job_id: str, data: bytes) -> Kept:
    """Keep what a job has made. Not `there` if there is no room."""
    arguments = [job_id, keys.PREFIX, keys.RESULT_TTL, VECTOR_BYTES, data]
    return Kept.parse(TRANSITIONS.keep_vectors(redis, names(job_id), arguments))


def fetch(job_id: str, patience: float) -> Call[Fetched]:
    """What a job has made. It is kept for some minutes from now on, and for as long as its reader bears a broker that
    is away: the answer may get lost."""
    lifetime = keys.FETCHED_TTL + ceil(patience)
    arguments = [job_id, keys.PREFIX, lifetime, keys.RESULT_TTL]
    return Call(lambda redis: TRANSITIONS.fetch_vectors(redis, names(job_id), arguments), Fetched.parse)


def prune(redis: Any) -> int:
    """Forget what is noted of vectors that have expired: of some at a time. Returns of how many."""
    noted = [keys.VECTORS_UNFETCHED, keys.VECTORS_FETCHED, keys.VECTORS_SIZES]
    return int(TRANSITIONS.prune_vectors(redis, noted, []))
