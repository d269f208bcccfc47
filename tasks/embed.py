"""Embedding: the vectors go into a blob, because JSON would triple them."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task

from stoker.broker import keys
from stoker.contract import EmbedReply, EmbedRequest, Usage, vectors
from stoker.contract.kinds import EMBED
from stoker.contract.vectors import Embedded
from workers.frame import JobTask, Run, complete, run_job


@shared_task(name=EMBED.task, base=JobTask, bind=True)
def embed(self: Task) -> dict[str, Any]:
    return run_job(self, EmbedRequest, _finish)


def _finish(run: Run, request: EmbedRequest, found: Embedded) -> EmbedReply:
    name = keys.vectors(run.job_id)
    data = vectors.save(found.vectors, request.dtype)
    run.runtime.persist(lambda: run.runtime.redis.set(keys.blob(name), data, ex=keys.RESULT_TTL))
    rows, dim = found.vectors.shape
    usage = Usage(prompt_tokens=found.tokens, run_seconds=found.run_seconds)
    return EmbedReply(blob=name, rows=rows, dim=dim, dtype=request.dtype, usage=complete(usage, run))
