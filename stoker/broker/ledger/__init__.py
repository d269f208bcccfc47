"""The ledger: what the broker knows of each job, beyond its message. One Lua script a transition, so that each happens
whole or not at all, also if its caller dies in the middle.

A job's way through them, who holds its message at each moment, and what happens when that one dies:
docs/architecture.md#a-message-of-the-queue. A worker owns a job under a token of its own from `claim` on, unless the
job has ended, another delivery of it runs, or it has crashed too many owners. An owner whose message was given to
another worker finds its token replaced: it is fenced, and must leave no trace.

`record.py` says what the record holds and how it is read; `replies.py` says what the scripts answer.

`submission`, `cancellation` and `lateness` are calls that a blocking or an asyncio client sends; every other function
takes a blocking client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from stoker.broker import keys
from stoker.broker.ledger.call import Call
from stoker.broker.ledger.ending import Ending
from stoker.broker.ledger.ending import failure as failure
from stoker.broker.ledger.ending import revoked as revoked
from stoker.broker.ledger.ending import success as success
from stoker.broker.ledger.listing import Listing, OpenJob
from stoker.broker.ledger.record import addressed
from stoker.broker.ledger.replies import Claim, DeadLettered, KeptPart, ManifestState, Passing, Submitted, recovered
from stoker.broker.ledger.script import LuaScript, text
from stoker.broker.ledger.transitions import TRANSITIONS
from stoker.broker.ledger.vectors import VECTOR_BYTES
from stoker.contract.kinds import READY, of_queue
from stoker.contract.requests import LOWEST_PRIORITY
from stoker.errors import DeadlineExceeded

#: Owners that a job may crash before it is dead-lettered.
MAX_CRASHES = 3
#: Jobs that may wait in one queue, and those of one client in it that have not ended, unless the policy says otherwise.
QUEUE_LIMIT = 20_000
CLIENT_LIMIT = 20_000
#: Jobs that one look for lost messages takes.
LOOKED_AT = 1000
#: Bytes that the jobs of one queue which have not ended may have, requests and inputs.
QUEUE_BYTES = 2 * 2**30
#: Dead letters that are looked at in one go.
LETTERS_AT_ONCE = 50
#: Seconds of waiting that lift a job by one priority (prelude.lua has the default too).
AGEING = 300

PRIORITIES = LOWEST_PRIORITY + 1

R = TypeVar("R")


TROUBLE = text("trouble")


def _call(
    script: LuaScript, parse: Callable[[Any], R], job_id: str, queue: str, *arguments: Any, extra: tuple[str, ...] = ()
) -> Call[R]:
    names = [keys.job(job_id), keys.result(job_id), keys.cancel(job_id), *_of_queue(queue), *extra]
    common = [job_id, keys.job(""), keys.PENDING_TTL, keys.RESULT_TTL, _window(queue)]
    return Call(lambda redis: script(redis, names, [*common, *arguments]), parse)


#: How many queues' keys are remembered: to make them anew took a tenth of a transition's time in the client.
_QUEUES = 256


@lru_cache(_QUEUES)
def _of_queue(queue: str) -> tuple[str, ...]:
    return (
        keys.ready(queue),
        keys.open_jobs(queue),
        keys.dispatched(queue),
        keys.turns(queue),
        keys.pace(queue),
        keys.POLICY,
        keys.sizes(queue),
        *(keys.backlog(queue, priority) for priority in range(PRIORITIES)),
    )


@lru_cache(_QUEUES)
def _window(queue: str) -> int:
    """How many jobs may stand in the ready list."""
    kind = of_queue(queue)
    return kind.ready if kind else READY


def submission(job_id: str, record: Mapping[str, str], data: bytes = b"", *, revive: bool = False) -> Call[Submitted]:
    """Accept a job. `record`: as `NewJob`. `data`: the input that its `blob` names. `revive`: the job is a dead letter;
    `unknown` if it is none."""
    queue, client = addressed(record)
    fields = [part for item in record.items() for part in item]
    limits = (QUEUE_LIMIT, CLIENT_LIMIT, QUEUE_BYTES, VECTOR_BYTES)
    arguments = (*limits, int(revive), keys.DEAD_TTL, data, *fields)
    shared = (keys.VECTORS_UNFETCHED, keys.VECTORS_FETCHED, keys.VECTORS_SIZES)
    extra = (keys.DEAD, keys.client(client, queue), *shared)
    return _call(TRANSITIONS.submit, Submitted.parse, job_id, queue, *arguments, extra=extra)


def submit(redis: Any, job_id: str, record: Mapping[str, str], data: bytes = b"", *, revive: bool = False) -> Submitted:
    return submission(job_id, record, data, revive=revive).on(redis)


def claim(redis: Any, job_id: str, queue: str, token: str, tag: str, worker: str) -> Claim:
    """Ask to own a job, under `token`, for the message with delivery tag `tag`."""
    arguments = (token, tag, worker, MAX_CRASHES)
    return _call(TRANSITIONS.claim, Claim.parse, job_id, queue, *arguments, extra=(keys.DEAD,)).on(redis)


def release(redis: Any, job_id: str, queue: str, token: str) -> bool:
    """Give a job back, alive: that its owner goes away is not held against the job. False for an owner that was
    fenced."""
    return _call(TRANSITIONS.release, bool, job_id, queue, token).on(redis)


def pass_on(redis: Any, job_id: str, queue: str, token: str, worker: str, *, needed: bool = False) -> Passing:
    """Let `worker` alone take the job, until it is recalled. Each job is passed on once at most, except where that is
    `needed`, because its owner cannot run it: such a job waits while that worker takes jobs of its model."""
    arguments, extra = (token, keys.PLACED_TTL, worker if needed else ""), (keys.placed(queue, worker),)
    return _call(TRANSITIONS.pass_on, Passing.parse, job_id, queue, *arguments, extra=extra).on(redis)


def recall(redis: Any, job_id: str, queue: str, worker: str) -> bool:
    """Let any worker take a job next that `worker` has not taken. False if it has, or the job has ended."""
    return _call(TRANSITIONS.recall, bool, job_id, queue, extra=(keys.placed(queue, worker),)).on(redis)


def count_out_of_memory(redis: Any, job_id: str, queue: str, token: str) -> int:
    """Count that the job ended for want of memory: how often by now, 0 for an owner that was fenced."""
    return _call(TRANSITIONS.out_of_memory, int, job_id, queue, token).on(redis)


def complete(redis: Any, job_id: str, queue: str, token: str, ending: Ending) -> bool:
    """End the job with `success`, `failure` or `revoked`. False for an owner that was fenced."""
    return _call(TRANSITIONS.complete, bool, job_id, queue, token, ending.text()).on(redis)


def abandon(redis: Any, job_id: str, queue: str, token: str, ending: Ending) -> bool:
    """End a job whose record, result or input another program wrote over. False for a job that has ended, or belongs to
    another owner than `token`."""
    return _call(TRANSITIONS.abandon, bool, job_id, queue, token, ending.text()).on(redis)


def cancellation(job_id: str, queue: str) -> Call[str]:
    """Cancel a job: `cancelled` (nobody ran it, and it has ended), `asked` (its owner stops it), `ended`, `unknown`."""
    arguments = (revoked(job_id).text(), keys.worker(""))
    return _call(TRANSITIONS.cancel, bytes.decode, job_id, queue, *arguments, extra=(keys.CANCELS,))


def cancel(redis: Any, job_id: str, queue: str) -> str:
    return cancellation(job_id, queue).on(redis)


def refuse(redis: Any, job_id: str, queue: str, ending: Ending) -> bool:
    """End a job that waits, because nobody will run it. False for one that has an owner, or is not known."""
    return _call(TRANSITIONS.refuse, bool, job_id, queue, ending.text()).on(redis)


def lateness(job_id: str, queue: str, deadline: float) -> Call[bool]:
    """End a job that waits still `deadline` seconds after its submission, with `DeadlineExceeded`. False for one that
    has time left, or an owner, or is not known."""
    error = DeadlineExceeded(f"job {job_id}: no worker took it, and it is past its deadline of {deadline:g} s.")
    return _call(TRANSITIONS.refuse, bool, job_id, queue, failure(job_id, error).text(), repr(deadline))


def recover(redis: Any, queue: str, older_than: float) -> tuple[str, ...]:
    """Let jobs wait again that were dispatched `older_than` seconds ago, whose message is not in the ready list, and
    that have no owner, or one whose worker is gone and whose message nobody holds. Not those that wait for the one
    worker that can run them. One look takes `LOOKED_AT` jobs, because nobody else is served meanwhile; the next one
    goes on behind those that run."""
    arguments = (older_than, keys.worker(""), LOOKED_AT)
    return _call(TRANSITIONS.recover, recovered, "", queue, *arguments, extra=(keys.UNACKED,)).on(redis)


def dead_letter(redis: Any, job_id: str, queue: str, token: str, worker: str = "", trouble: str = "") -> DeadLettered:
    """Make a dead letter of a job that crashed too many owners, or that `worker` gives up for `trouble`. Its owner ends
    it then."""
    arguments = (token, worker, trouble, keys.DEAD_TTL)
    return _call(TRANSITIONS.dead_letter, DeadLettered.parse, job_id, queue, *arguments, extra=(keys.DEAD,)).on(redis)


def forget_letters(redis: Any) -> int:
    """Forget dead letters that are older than they are kept. It looks at some at a time; returns how many went."""
    return int(TRANSITIONS.forget_letters(redis, [keys.DEAD], [keys.DEAD_TTL, LETTERS_AT_ONCE]))


def keep_part(redis: Any, job_id: str, queue: str, token: str, name: str, data: bytes) -> KeptPart:
    """Keep a part of a training run's checkpoints, under `name`, which ends with `-` and its bytes. It lives as long as
    a job may; no manifest needs it yet."""
    arguments, extra = (token, name, data, QUEUE_BYTES), (keys.checkpoint(job_id),)
    return _call(TRANSITIONS.keep_part, KeptPart.parse, job_id, queue, *arguments, extra=extra).on(redis)


def keep_manifest(
    redis: Any, job_id: str, queue: str, token: str, manifest: str, parts: Iterable[str]
) -> ManifestState:
    """From now on the run resumes by `manifest`, which needs these parts of the broker; other parts go."""
    arguments, extra = (token, manifest, *parts), (keys.checkpoint(job_id),)
    return _call(TRANSITIONS.keep_manifest, ManifestState.parse, job_id, queue, *arguments, extra=extra).on(redis)


def pin(redis: Any, job_id: str, version: int) -> str:
    """Let a job use this version of its adapter from its first owner to its last: the one that it uses."""
    return _version(TRANSITIONS.pin(redis, [keys.job(job_id)], [version, keys.PENDING_TTL]))


def allocate(redis: Any, model: str, name: str, job_id: str, floor: int) -> str:
    """The number of the version that this job makes, at least `floor`: the same however often it asks."""
    names = [keys.job(job_id), keys.adapter(model, name)]
    return _version(TRANSITIONS.allocate(redis, names, [floor, keys.PENDING_TTL]))


def _version(reply: bytes) -> str:
    return reply.decode(errors="replace")


def note_trouble(pipeline: Any, job_id: str, trouble: str) -> None:
    """Say in the job's record why its owner is about to end. The script goes by its text, because a pipeline
    cannot send it again."""
    pipeline.eval(TROUBLE, 1, keys.job(job_id), trouble)


def open_jobs(redis: Any, queues: Iterable[str]) -> dict[str, OpenJob]:
    """Jobs of `queues` that have not ended, oldest first; see `Listing.jobs`. For a blocking client."""
    listing = Listing(queues)
    ids = listing.ask_ids(redis.pipeline()).execute()
    return listing.jobs(listing.ask_records(redis.pipeline(), ids).execute(raise_on_error=False))
