"""Embedding: the vectors go into a blob, because JSON would triple them."""

from __future__ import annotations

from stoker.broker import keys
from stoker.contract import EmbedReply, EmbedRequest, Usage, vectors
from stoker.contract.vectors import Embedded
from workers.job import Job, JobHandler, Submit, job_task


class EmbedHandler(JobHandler[EmbedRequest, None, Embedded]):
    request = EmbedRequest

    def load_input(self, job: Job, request: EmbedRequest) -> None:
        """The request has its texts."""

    def submit(self, job: Job) -> Submit[EmbedRequest, None, Embedded]:
        return job.runtime.engine.submit

    def finish(self, job: Job, request: EmbedRequest, result: Embedded) -> EmbedReply:
        name, redis = keys.vectors(job.id), job.runtime.redis
        data = vectors.save(result.vectors, request.dtype)
        job.runtime.persist(lambda: redis.set(keys.blob(name), data, ex=keys.RESULT_TTL))
        rows, dim = result.vectors.shape
        usage = Usage(prompt_tokens=result.tokens, run_seconds=result.run_seconds)
        return EmbedReply(blob=name, rows=rows, dim=dim, dtype=request.dtype, usage=job.usage(usage))


embed = job_task(EmbedHandler())
