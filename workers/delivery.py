"""One message that brought a job here: whose it is, how it is claimed, and what the monitors hear of it."""

from __future__ import annotations

import logging

from celery import Task
from celery.exceptions import Ignore
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from stoker.broker import keys
from stoker.broker.ledger.replies import Claim
from stoker.contract.kinds import of_task
from stoker.contract.names import Rule, checked
from stoker.errors import JobDead
from workers.account import JobAccount
from workers.context import WorkerContext
from workers.job_lease import JobLease
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: States of a claim that leave nothing to do, and why.
_DROPPED = {
    "ended": "has ended",
    "duplicate": "runs already",
    "unknown": "the broker knows no longer",
    "spoiled": "has a record that no client wrote",
}


class Delivery:
    """Of one job, which may be delivered more than once; `lease` says which delivery owns it."""

    def __init__(self, task: Task) -> None:
        self.context: WorkerContext = task.app.context
        self.runtime: Runtime = self.context.runtime
        self.id, self.kind = str(task.request.id), of_task(task.name)
        queue, token = task.request.delivery_info["routing_key"], task.request.stoker_token
        self.lease = JobLease(self.runtime, self.id, queue, token, task.request.stoker_tag)
        self._task = task
        self.account = JobAccount(self.id, self.kind.name, keys.model_of(queue))

    def claim(self) -> Claim:
        """Become the job's owner. Raises `Ignore` for a delivery that has nothing to do any more."""
        with self.account.phase("claim"):
            claim = self.lease.claim()
        # The id will be a folder's name.
        checked(Rule.JOB_ID, "job id", self.id)
        if claim.state in _DROPPED:
            log.info("job %s: dropped a delivery of a job that %s", self.id, _DROPPED[claim.state])
            raise Ignore
        if claim.state == "dead":
            history = self.lease.dead_letter()
            workers = ", ".join(crash.worker for crash in history)
            raise JobDead(
                f"job {self.id} was running when {len(history)} workers crashed ({workers}). It is a dead letter: "
                f"`stoker jobs retry {self.id}` sends it again."
            )
        self.account.claimed(claim)
        self.runtime.observers.begun(self.account)
        return claim

    def report(self, event: str, **fields: object) -> None:
        """Send an event to the monitors, above all Flower. No job waits for it, and none fails if it cannot be sent."""
        try:
            self._task.send_event(event, retry=False, **fields)
        except (OperationalError, RedisError, OSError) as error:
            log.debug("job %s: %s was not sent: %s", self.id, event, error)
