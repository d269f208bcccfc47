"""Training: the engine streams reports, this returns the adapter's name and version."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task

from stoker.contract import TrainRequest, TrainResult
from workers.frame import JobTask, Run, blob, complete, run_job


@shared_task(name="stoker.train", base=JobTask, bind=True)
def train(self: Task) -> dict[str, Any]:
    return run_job(self, TrainRequest, _finish, lambda run, request: blob(run, request.dataset))


def _finish(run: Run, request: TrainRequest, result: TrainResult) -> TrainResult:
    return result.model_copy(update={"usage": complete(result.usage, run)})
