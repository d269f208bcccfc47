"""A job of a better priority that waits while this worker's slots have worse ones: it is taken all the same.

A full lane asks the broker for no job (`workers/celery/consumer.py`), so a stream would wait in the ready list until
one here has ended. Celery takes what stands first there, and has no way to take what is better alone. So a full
lane looks at what stands first, and takes one more if that is better than enough of what it holds; in the engine the
worse ones make way. Another worker may have been faster: then another job comes, of any priority. For that there is a
bound, `most`.

While bulk here makes way for streams of another worker on the device, that worker runs bulk next to them at less cost:
in the same passes. So this one leaves it there: it takes a first job, what need not rest, and of the others what nobody
has taken for a while, because that worker is full or has another model.
"""

from __future__ import annotations

from typing import Any

from stoker.broker import keys
from stoker.broker.envelope import UnreadableMessage, read
from stoker.broker.ledger import record
from stoker.contract.kinds import GENERATE
from stoker.contract.requests import LOWEST_PRIORITY
from workers.capacity import Lanes
from workers.services.runtime import Runtime

#: Seconds between two looks of a full lane.
EVERY = 0.25
KIND = GENERATE.name
#: Looks at which the same job is the best one that waits until it counts as left to this worker.
LEFT_AFTER = 20
MAKES_WAY = "another worker on this machine runs streams, and bulk work here makes way"


class Overtaking:
    """`most`: jobs that the lane may hold beyond its slots."""

    def __init__(self, runtime: Runtime, lanes: Lanes, most: int) -> None:
        self._runtime, self._lanes, self._most = runtime, lanes, most
        #: The best job that waited at the last look, and at how many it has done so.
        self._waited, self._looks = "", 0

    def round(self) -> None:
        if self._runtime.makes_way(LOWEST_PRIORITY):
            self._lanes.narrow(KIND, 1, MAKES_WAY)
        else:
            self._lanes.widen(KIND)
        held, most = self._lanes.load()[KIND]
        slots = self._lanes.slots(KIND)
        here = self._runtime.priorities(KIND)
        if held < most or held >= slots + self._most or (held >= slots and not any(here)):
            return
        best = self._best_waiting()
        if best is None:
            return
        waiting, job_id = best
        self._looks = self._looks + 1 if job_id == self._waited else 1
        self._waited = job_id
        if held < slots:
            takes = not self._runtime.makes_way(waiting) or self._looks > LEFT_AFTER
        else:
            # A job that is claimed and not prepared yet counts as good.
            takes = held - sum(priority > waiting for priority in here) < slots
        if takes:
            self._lanes.lend(KIND, held + 1)

    def _best_waiting(self) -> tuple[int, str] | None:
        """Of what stands first in the ready lists, the best priority, and its job; None: nothing can be read there."""
        queues = self._lanes.queues(KIND)
        first = self._runtime.redis.pipeline()
        for queue in queues:
            first.lindex(keys.ready(queue), -1)
        messages = zip(queues, first.execute(raise_on_error=False), strict=True)
        jobs = [job_id for queue, raw in messages if (job_id := _job_of(raw, queue)) is not None]
        asked, records = [record.listed(job_id) for job_id in jobs], self._runtime.redis.pipeline()
        for call in asked:
            call.send(records)
        replies = records.execute(raise_on_error=False) if asked else ()
        known = [
            (job.priority, job_id)
            for job_id, call, reply in zip(jobs, asked, replies, strict=True)
            if (job := call.parse(reply)) is not None
        ]
        return min(known, default=None)


def _job_of(raw: Any, queue: str) -> str | None:
    """The job of a message; None for what is none, or cannot be read: a worker that takes it says so."""
    if not isinstance(raw, bytes):
        return None
    try:
        job_id: str = read(raw, queue)["headers"]["id"]
    except UnreadableMessage:
        return None
    return job_id
