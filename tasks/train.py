"""Training: the engine streams reports, this returns the adapter's name and version."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task

from stoker import keys
from stoker.contract import TrainRequest, TrainResult
from workers.frame import JobTask, complete, run_job
from workers.runtime import Runtime


@shared_task(name="stoker.train", base=JobTask, bind=True)
def train(self: Task, payload: Any) -> dict[str, Any]:
    def fetch(runtime: Runtime, request: TrainRequest) -> bytes | None:
        return runtime.redis.get(keys.blob(request.dataset))  # type: ignore[no-any-return]

    def finish(runtime: Runtime, request: TrainRequest, result: TrainResult) -> TrainResult:
        runtime.persist(lambda: runtime.redis.delete(keys.blob(request.dataset)))
        return result.model_copy(update={"usage": complete(result.usage, runtime, self.request.id)})

    return run_job(self, payload, TrainRequest, finish, fetch)
