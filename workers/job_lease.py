"""One delivery's side of the ledger: it claims its job, and completes it or gives it back, however long the broker is
away."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from redis.exceptions import RedisError, ResponseError

from stoker.broker import ledger
from stoker.broker.connection import passes
from stoker.broker.ledger.ending import Ending
from stoker.broker.ledger.replies import Claim, Crash, KeptPart, ManifestState, Passing
from stoker.broker.trouble import forbids
from stoker.errors import JobFailed, WorkerUnavailable
from workers.blame import blame
from workers.services.runtime import Fenced, Runtime

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Spoiled(Exception):
    """The ledger can never do its work on this job, because the broker holds something else than it expects."""


class PassedOn(WorkerUnavailable):
    """Another worker may take the job now. Never leaves the process."""


def is_the_brokers(error: Exception) -> bool:
    """Whether another worker, or this one later, may succeed, because the broker is away or forbids the command."""
    return isinstance(error, RedisError) and (passes(error) or forbids(error))


@dataclass(frozen=True)
class JobLease:
    """`token`: names this delivery, and no other of the job. `tag`: kombu's name of its message.

    Every transition may raise `Spoiled`; those that only the owner may make raise `Fenced` for a delivery that no
    longer owns the job.
    """

    runtime: Runtime
    job_id: str
    queue: str
    token: str
    tag: str

    def claim(self) -> Claim:
        return self._persist(ledger.claim, self.token, self.tag, self.runtime.name)

    def complete(self, ending: Ending) -> None:
        """End the job with `ending`."""
        self._only_as_owner(self._persist(ledger.complete, self.token, ending))

    def release(self) -> None:
        """Give the job back to its queue, alive."""
        self._persist(ledger.release, self.token)

    def pass_on(self, worker: str, *, needed: bool = False) -> bool:
        """Let another worker take the job. False if this one keeps it, as one that was passed on before and is not
        `needed` to be."""
        state = self._persist(ledger.pass_on, self.token, worker, needed=needed)
        self._only_as_owner(state is not Passing.FENCED)
        return state is Passing.PASSED

    def dead_letter(self, worker: str = "", trouble: str = "") -> tuple[Crash, ...]:
        """Make a dead letter of the job, of the owners that it crashed or of this `worker`, for `trouble`. Return what
        the letter says of its owners."""
        reply = self._persist(ledger.dead_letter, self.token, worker, trouble)
        self._only_as_owner(not reply.fenced)
        return reply.history

    def count_out_of_memory(self) -> int:
        """How often the job has ended for want of memory, this time included."""
        count = self._persist(ledger.count_out_of_memory, self.token)
        self._only_as_owner(count > 0)
        return count

    def keep_part(self, name: str, data: bytes) -> KeptPart:
        """Keep a part of a training run's checkpoints. A broker that is away is not waited for: the run goes on."""
        kept = ledger.keep_part(self.runtime.redis, self.job_id, self.queue, self.token, name, data)
        self._only_as_owner(not kept.fenced)
        return kept

    def keep_manifest(self, manifest: str, parts: Iterable[str]) -> bool:
        """Let the run resume by `manifest`, in the same way. False if one of its parts is not there."""
        state = ledger.keep_manifest(self.runtime.redis, self.job_id, self.queue, self.token, manifest, parts)
        self._only_as_owner(state is not ManifestState.FENCED)
        return state is ManifestState.KEPT

    def give_up(self, trouble: Spoiled) -> None:
        """End a job that the ledger cannot end: its client gets the error, and its message goes."""
        log.error("job %s cannot be ended as others are: %s", self.job_id, trouble)
        ending = ledger.failure(self.job_id, JobFailed(f"job {self.job_id}: {trouble}."))
        self._persist(ledger.abandon, self.token, ending)

    def blame(self, error: RedisError) -> str:
        """What the broker refused, and which key is to blame."""
        return blame(self.runtime.redis, self.job_id, self.queue, error)

    def _only_as_owner(self, is_owner: bool) -> None:
        if not is_owner:
            raise Fenced(f"job {self.job_id} runs elsewhere.")

    def _persist(self, transition: Callable[Concatenate[Any, str, str, P], T], *args: P.args, **named: P.kwargs) -> T:
        """One transition of the ledger."""
        try:
            return self.runtime.persist(lambda: transition(self.runtime.redis, self.job_id, self.queue, *args, **named))
        except ResponseError as error:
            if is_the_brokers(error):
                raise
            raise Spoiled(self.blame(error)) from error
