"""Training: the engine streams reports, this registers the adapter and returns its name and version."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task

from stoker.contract import TrainRequest, TrainResult
from stoker.contract.dataset import TrainInput
from stoker.contract.kinds import TRAIN
from workers import adapters, datasets
from workers.frame import JobTask, Run, complete, run_job


@shared_task(name=TRAIN.task, base=JobTask, bind=True)
def train(self: Task) -> dict[str, Any]:
    return run_job(self, TrainRequest, _finish, _input)


def _input(run: Run, request: TrainRequest) -> TrainInput | None:
    data = datasets.fetch(run, request.dataset)
    return None if data is None else TrainInput(data, adapters.allocate(run, request.model, request.name))


def _finish(run: Run, request: TrainRequest, result: TrainResult) -> TrainResult:
    known = {
        "rank": request.rank,
        "method": "dora" if request.dora else "lora",
        "source": "trained",
        "steps": result.steps,
        "loss": result.last_loss,
        "held_out_loss": result.held_out_loss,
    }
    run.runtime.persist(
        lambda: adapters.publish(run, request.model, request.name, result.version, known, promote=request.promote)
    )
    run.runtime.persist(lambda: datasets.forget(run, request.dataset))
    return result.model_copy(update={"usage": complete(result.usage, run)})
