"""Memory for a training run next to those that run here already. A run that does not fit goes back to its queue before
its dataset is fetched, and this worker takes no other until one of its own has ended."""

from __future__ import annotations

from stoker.contract import TrainRequest
from workers.capacity import DoesNotFit
from workers.job import Job


def reserve(job: Job, request: TrainRequest) -> None:
    """Let the run have its memory for as long as this delivery of it is here. Raises `DoesNotFit`."""
    engine = job.runtime.engine
    if request.model not in engine.models:
        # The engine says so when it gets the job.
        return
    needed, memory = engine.kept_by(request), engine.run_memory
    others = memory.reserve(job.token, needed)
    if others:
        raise DoesNotFit(
            f"a run that keeps {_megabytes(needed)} MB does not fit next to {others} that keep "
            f"{_megabytes(memory.kept)} of {_megabytes(memory.limit)} MB (STOKER_TRAIN_MEMORY)",
            others,
        )
    job.resources.callback(memory.release, job.token)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
