"""Embedding: the vectors go into a blob, because JSON would triple them."""

from __future__ import annotations

from typing import Any

import safetensors.numpy
from celery import Task, shared_task

from stoker import keys
from stoker.contract import EmbedReply, EmbedRequest, Usage
from workers.frame import JobTask, complete, run_job
from workers.runtime import Runtime


@shared_task(name="stoker.embed", base=JobTask, bind=True)
def embed(self: Task, payload: Any) -> dict[str, Any]:
    def finish(runtime: Runtime, request: EmbedRequest, work: Any) -> EmbedReply:
        blob = f"vectors:{self.request.id}"
        data = safetensors.numpy.save({"vectors": work.vectors})
        runtime.persist(lambda: runtime.redis.set(keys.blob(blob), data, ex=keys.RESULT_TTL))
        rows, dim = work.vectors.shape
        usage = Usage(prompt_tokens=work.tokens, run_seconds=work.ticket.run_seconds)
        return EmbedReply(blob=blob, rows=rows, dim=dim, usage=complete(usage, runtime, self.request.id))

    return run_job(self, payload, EmbedRequest, finish)
