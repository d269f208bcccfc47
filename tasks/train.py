"""Training: the engine streams reports, this registers the adapter and returns its name and version."""

from __future__ import annotations

from stoker.contract import TrainRequest, TrainResult
from stoker.contract.dataset import TrainInput
from workers import adapters, datasets, moving, run_room
from workers.job import Job, JobHandler, Submit, job_task


class TrainHandler(JobHandler[TrainRequest, TrainInput | None, TrainResult]):
    request = TrainRequest

    def load_input(self, job: Job, request: TrainRequest) -> TrainInput | None:
        run_room.reserve(job, request)
        data = datasets.fetch(job, request.dataset)
        if data is None:
            return None
        version = adapters.allocate(job, request.model, request.name)
        moving.resume(job, request)
        mirror = job.resources.enter_context(moving.RunMirror(job, request))
        return TrainInput(data, version, mirror.kept)

    def submit(self, job: Job) -> Submit[TrainRequest, TrainInput | None, TrainResult]:
        return job.runtime.engine.submit

    def finish(self, job: Job, request: TrainRequest, result: TrainResult) -> TrainResult:
        known = {
            "rank": request.rank,
            "method": "dora" if request.dora else "lora",
            "source": "trained",
            "steps": result.steps,
            "loss": result.last_loss,
            "held_out_loss": result.held_out_loss,
        }
        job.runtime.persist(
            lambda: adapters.publish(job, request.model, request.name, result.version, known, promote=request.promote)
        )
        return result.model_copy(update={"usage": job.usage(result.usage)})


train = job_task(TrainHandler())
