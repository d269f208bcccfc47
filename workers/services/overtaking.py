"""A job of a better priority that waits while this worker's slots have worse ones: it is taken all the same.

A full lane asks the broker for no job (`workers/celery/consumer.py`), so a stream would wait in the ready list until
one here has ended. Celery takes what stands first there, and has no way to take what is better alone. So a full
lane looks at what stands first, and takes one more if that is better than enough of what it holds; in the engine the
worse ones make way. Another worker may have been faster: then another job comes, of any priority. For that there is a
bound, `most`.
"""

from __future__ import annotations

from typing import Any

from stoker.broker import keys
from stoker.broker.envelope import UnreadableMessage, read
from stoker.broker.ledger import record
from stoker.contract.kinds import GENERATE
from workers.capacity import Lanes
from workers.services.runtime import Runtime

#: Seconds between two looks of a full lane.
EVERY = 0.25
KIND = GENERATE.name


class Overtaking:
    """`most`: jobs that the lane may hold beyond its slots."""

    def __init__(self, runtime: Runtime, lanes: Lanes, most: int) -> None:
        self._runtime, self._lanes, self._most = runtime, lanes, most

    def round(self) -> None:
        held, slots = self._lanes.load()[KIND]
        here = self._runtime.priorities(KIND)
        if held < slots or held >= slots + self._most or not any(here):
            return
        waiting = self._best_waiting()
        if waiting is None:
            return
        # A job that is claimed and not prepared yet counts as good.
        worse = sum(priority > waiting for priority in here)
        if held - worse < slots:
            self._lanes.lend(KIND, held + 1)

    def _best_waiting(self) -> int | None:
        """The best priority of what stands first in the ready lists; None: nothing that can be read does."""
        queues = self._lanes.queues(KIND)
        first = self._runtime.redis.pipeline()
        for queue in queues:
            first.lindex(keys.ready(queue), -1)
        messages = zip(queues, first.execute(raise_on_error=False), strict=True)
        asked = [record.listed(job_id) for queue, raw in messages if (job_id := _job_of(raw, queue)) is not None]
        records = self._runtime.redis.pipeline()
        for call in asked:
            call.send(records)
        found = zip(asked, records.execute(raise_on_error=False), strict=True) if asked else ()
        known = [job for call, reply in found if (job := call.parse(reply)) is not None]
        return min((job.priority for job in known), default=None)


def _job_of(raw: Any, queue: str) -> str | None:
    """The job of a message; None for what is none, or cannot be read: a worker that takes it says so."""
    if not isinstance(raw, bytes):
        return None
    try:
        job_id: str = read(raw, queue)["headers"]["id"]
    except UnreadableMessage:
        return None
    return job_id
