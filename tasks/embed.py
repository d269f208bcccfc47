"""Embedding: the vectors go into a blob, because JSON would triple them."""

from __future__ import annotations

import logging
import time

from stoker.broker import keys
from stoker.broker.ledger.vectors import keep
from stoker.contract import EmbedReply, EmbedRequest, Usage, vectors
from stoker.contract.vectors import Embedded
from stoker.errors import VectorsFull, WorkerUnavailable
from workers.job import Job, JobHandler, Submit, job_task

log = logging.getLogger(__name__)

#: Seconds that a job waits for room, in its place in the lane: clients that fetch in order make some all the time.
ROOM_LIMIT = 30.0
#: Seconds between two looks.
LOOK_EVERY = 0.5


class EmbedHandler(JobHandler[EmbedRequest, None, Embedded]):
    request = EmbedRequest

    def load_input(self, job: Job, request: EmbedRequest) -> None:
        """The request has its texts."""

    def submit(self, job: Job) -> Submit[EmbedRequest, None, Embedded]:
        return job.runtime.engine.submit

    def finish(self, job: Job, request: EmbedRequest, result: Embedded) -> EmbedReply:
        _keep(job, vectors.save(result.vectors, request.dtype), time.monotonic() + ROOM_LIMIT)
        rows, dim = result.vectors.shape
        usage = Usage(prompt_tokens=result.tokens, run_seconds=result.run_seconds)
        return EmbedReply(blob=keys.vectors(job.id), rows=rows, dim=dim, dtype=request.dtype, usage=job.usage(usage))


def _keep(job: Job, data: bytes, until: float) -> None:
    """Raises `VectorsFull` if there is no room by then."""
    runtime, waited = job.runtime, False
    while not (kept := runtime.persist(lambda: keep(runtime.redis, job.id, data))).there:
        said = f"vectors that wait to be fetched have {kept.bytes} bytes and may have {kept.limit}"
        if time.monotonic() >= until:
            raise VectorsFull(
                f"job {job.id}: there is no room for its {len(data)} bytes of vectors: {said}. Fetch those of jobs "
                "that are done (`result()`) or `discard()` them, or let the operator raise it: `stoker jobs policy "
                "vector_bytes`. Then send the job again."
            )
        if not waited:
            log.warning("job %s waits for room: %s (`stoker jobs policy vector_bytes`)", job.id, said)
            waited = True
        if runtime.stopped.wait(LOOK_EVERY):
            raise WorkerUnavailable("the worker is stopping. The job goes to another one.")


embed = job_task(EmbedHandler())
