"""Training: the engine streams reports, this returns the adapter's name and version."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task

from stoker.contract import TrainRequest, TrainResult
from stoker.contract.dataset import TrainInput
from workers.frame import JobTask, Run, blob, complete, run_job


@shared_task(name="stoker.train", base=JobTask, bind=True)
def train(self: Task) -> dict[str, Any]:
    return run_job(self, TrainRequest, _finish, _input)


def _input(run: Run, request: TrainRequest) -> TrainInput | None:
    data = blob(run, request.dataset)
    return None if data is None else TrainInput(data)


def _finish(run: Run, request: TrainRequest, result: TrainResult) -> TrainResult:
    return result.model_copy(update={"usage": complete(result.usage, run)})
