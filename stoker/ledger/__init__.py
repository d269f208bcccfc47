"""The ledger: what the broker knows of each job, beyond its message. One Lua script a transition, so that each happens
whole or not at all, whoever dies in the middle.

A job's life: `submit` writes its record and lets it wait in a room, from which the best come to the front, the list
that Celery takes messages from (`prelude.lua`). A worker that gets the message calls `claim`: it becomes the owner
under a token of its own, unless the job has ended, another delivery of it runs, or it has killed too many owners. When
the worker is done it calls `settle`, which stores the result; when it gives the job back, `release`. An owner whose
message was given to another worker (it was frozen for longer than its lease) finds its token replaced: it is fenced,
and must leave no trace.

A message can be lost between the front and a worker's memory. `recover` finds jobs that were handed out and that nobody
alive owns, and lets them wait again; that is safe, because a second delivery of a running job is dropped.

Every function takes a blocking or an asyncio client and returns what its script does, unless it says otherwise.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from stoker import keys
from stoker.ledger.listing import Listing
from stoker.ledger.script import Script

#: Owners that a job may kill before it is put aside.
MAX_DEATHS = 3
#: Jobs that may wait in one queue, and those of one client in it that have not ended, unless the policy says otherwise.
QUEUE_LIMIT = 20_000
CLIENT_LIMIT = 20_000
#: Seconds of waiting that lift a job by one priority (prelude.lua has the default too).
AGEING = 300
#: Messages at the front of a queue: enough to keep workers busy between two claims, few enough that a better job that
#: comes later does not wait long. Training runs last, so one is enough.
FRONT = 8
FRONT_TRAIN = 1

PRIORITIES = 10


def _text(name: str) -> str:
    return resources.files(__name__).joinpath(f"{name}.lua").read_text()


SUBMIT, CLAIM, RELEASE, SETTLE, CANCEL, RECOVER = (
    Script(_text("prelude") + _text(name)) for name in ("submit", "claim", "release", "settle", "cancel", "recover")
)
BURY = Script(_text("bury"))


@dataclass(frozen=True)
class Claim:
    """`state`: `run`, `ended`, `duplicate`, `unknown` or `dead`. `age`: seconds since submission. `resumed`: somebody
    began it. `request`: what was asked, JSON. `cancelled`: somebody asked for its end before."""

    state: str
    age: float
    resumed: bool
    request: str = ""
    cancelled: bool = False

    @classmethod
    def parse(cls, reply: list[bytes]) -> Claim:
        state, age, resumed, request, *cancelled = reply
        return cls(state.decode(), float(age), resumed == b"1", request.decode(), cancelled == [b"1"])


def _run(redis: Any, script: Script, job_id: str, queue: str, *arguments: Any, extra: tuple[str, ...] = ()) -> Any:
    names = [
        keys.job(job_id),
        keys.result(job_id),
        keys.cancel(job_id),
        keys.front(queue),
        keys.open_jobs(queue),
        keys.handed(queue),
        keys.turns(queue),
        keys.pace(queue),
        keys.POLICY,
        *(keys.room(queue, priority) for priority in range(PRIORITIES)),
        *extra,
    ]
    window = FRONT_TRAIN if re.search(r"\.train(\.v\d+)?$", queue) else FRONT
    common = (job_id, keys.job(""), keys.PENDING_TTL, keys.RESULT_TTL, window)
    return script(redis, names, [*common, *arguments])


def submit(redis: Any, job_id: str, record: dict[str, str], data: bytes = b"", *, revive: bool = False) -> Any:
    """Accept a job: [`new` | `known` | `full` | `client_full`, jobs there, limit, seconds to wait].

    `data`: the input that the record's `blob` names. `revive`: the job is a dead letter; `unknown` if it is none.
    """
    queue = record["queue"]
    fields = [part for item in record.items() for part in item]
    extra = (keys.DEAD, keys.client(record["client"], queue))
    return _run(redis, SUBMIT, job_id, queue, QUEUE_LIMIT, CLIENT_LIMIT, int(revive), data, *fields, extra=extra)


def claim(redis: Any, job_id: str, queue: str, token: str, tag: str, worker: str) -> Any:
    """Ask to own a job, under `token`, for the message with delivery tag `tag`. `Claim.parse` reads the reply."""
    return _run(redis, CLAIM, job_id, queue, token, tag, worker, MAX_DEATHS)


def release(redis: Any, job_id: str, queue: str, token: str, reason: str = "") -> Any:
    """Give a job back, alive: that its owner goes away is not held against the job. `reason`: a field of its record
    that counts how often it was given back for that reason; the count is returned, 0 for an owner that was fenced."""
    return _run(redis, RELEASE, job_id, queue, token, reason)


def settle(redis: Any, job_id: str, queue: str, token: str, outcome: dict[str, Any]) -> Any:
    """End the job with `outcome` (`success`, `failure` or `revoked`): 1, or 0 for an owner that was fenced."""
    return _run(redis, SETTLE, job_id, queue, token, json.dumps(outcome))


def cancel(redis: Any, job_id: str, queue: str) -> Any:
    """Cancel a job: `cancelled` (nobody ran it, and it has ended), `asked` (its owner stops it), `ended`, `unknown`."""
    return _run(redis, CANCEL, job_id, queue, json.dumps(revoked(job_id)), keys.worker(""), extra=(keys.CANCELS,))


def recover(redis: Any, queue: str, older_than: float) -> Any:
    """Let jobs wait again that were handed out `older_than` seconds ago and have neither living owner nor message."""
    return _run(redis, RECOVER, "", queue, older_than, keys.worker(""), extra=(keys.UNACKED,))


def bury(redis: Any, job_id: str, worker: str = "", trouble: str = "") -> list[dict[str, Any]]:
    """Put a job aside that killed too many owners, or that `worker` gives up for `trouble`, and return their history.
    For a blocking client."""
    reply = BURY(redis, [keys.job(job_id), keys.DEAD], [job_id, worker, trouble, keys.DEAD_TTL])
    history: list[dict[str, Any]] = json.loads(reply)
    return history


def success(job_id: str, result: Any) -> dict[str, Any]:
    """The record of a result, as Celery's own backend writes it, so that its tools can read it."""
    return _record(job_id, "SUCCESS", result)


def failure(job_id: str, error: BaseException) -> dict[str, Any]:
    """The record of an error: its class and its message."""
    kind = type(error)
    fields = {"exc_type": kind.__name__, "exc_message": [str(error)], "exc_module": kind.__module__}
    return _record(job_id, "FAILURE", fields)


def revoked(job_id: str) -> dict[str, Any]:
    """The record of a job that was cancelled."""
    fields = {"exc_type": "TaskRevokedError", "exc_message": ["cancelled"], "exc_module": "celery.exceptions"}
    return _record(job_id, "REVOKED", fields)


def _record(job_id: str, status: str, result: Any) -> dict[str, Any]:
    done = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return {
        "status": status,
        "result": result,
        "traceback": None,
        "children": [],
        "date_done": done,
        "task_id": job_id,
    }


def open_jobs(redis: Any, queues: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Jobs of `queues` that have not ended, oldest first; see `Listing.jobs`. For a blocking client."""
    listing = Listing(queues)
    ids = listing.ask_ids(redis.pipeline()).execute()
    return listing.jobs(listing.ask_records(redis.pipeline(), ids).execute())
