"""Generation: the engine streams the tokens, this returns the whole."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task

from stoker.contract import GenerateRequest, GenerateResult
from workers.frame import JobTask, complete, run_job
from workers.runtime import Runtime


@shared_task(name="stoker.generate", base=JobTask, bind=True)
def generate(self: Task, payload: Any) -> dict[str, Any]:
    def finish(runtime: Runtime, request: GenerateRequest, result: GenerateResult) -> GenerateResult:
        return result.model_copy(update={"usage": complete(result.usage, runtime, self.request.id)})

    return run_job(self, payload, GenerateRequest, finish)
