"""Taking what a job has made out of the broker, once it is where it belongs: its vectors, its stream, its result. For
some minutes it is still known that there was such a job, and that it was discarded."""

from __future__ import annotations

from typing import Any

from stoker.broker import keys
from stoker.broker.ledger.call import Call
from stoker.broker.ledger.ending import BEGINNING, discarded
from stoker.broker.ledger.transitions import TRANSITIONS
from stoker.broker.ledger.vectors import names


def discard(job_id: str) -> Call[Any]:
    """Takes out what the job has made; of one that has not succeeded, its vectors alone."""
    found = [*names(job_id), keys.result(job_id), keys.stream(job_id)]
    arguments = [job_id, keys.PREFIX, keys.FETCHED_TTL, BEGINNING, discarded(job_id).text()]
    return Call(lambda redis: TRANSITIONS.discard(redis, found, arguments), bool)
