"""Jobs that Celery's control messages revoke, cancelled through the ledger, which knows those that wait too."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterable

from stoker.broker import ledger
from stoker.broker.ledger import record
from stoker.contract.names import Rule, follows
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: Ids that may wait for a broker that is away.
WAITING = 10_000


class Revocations:
    """`ask` is called in the consumer's thread, which must not wait for the broker; `cancel_next` in a thread of its
    own."""

    def __init__(self) -> None:
        self._asked: queue.Queue[str] = queue.Queue(WAITING)

    def ask(self, job_ids: Iterable[object]) -> int:
        """Cancel these soon; return how many of them were taken. A control message may hold anything."""
        taken = 0
        for job_id in job_ids:
            if not isinstance(job_id, str) or not follows(Rule.JOB_ID, job_id):
                continue
            try:
                self._asked.put_nowait(job_id)
            except queue.Full:
                log.error("%d revoked jobs wait to be cancelled: the others of this message are left out", WAITING)
                return taken
            taken += 1
        return taken

    @property
    def idle(self) -> bool:
        return self._asked.empty()

    def cancel_next(self, runtime: Runtime, wait: float = 1.0) -> None:
        """Cancel one; wait a moment for it. One that the broker does not know, or has ended, is left as it is."""
        try:
            job_id = self._asked.get(timeout=wait)
        except queue.Empty:
            return
        known = runtime.persist(lambda: record.summary(job_id).on(runtime.redis))
        if known.queue is not None:
            name = known.queue
            found = runtime.persist(lambda: ledger.cancel(runtime.redis, job_id, name))
            log.info("job %s was revoked by a control message: %s", job_id, found)
