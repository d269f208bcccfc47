"""Loading an adapter that was made elsewhere: the engine checks it, this registers it."""

from __future__ import annotations

from stoker.contract import AdapterRequest, AdapterResult
from stoker.contract.bundle import AdapterInput
from stoker.errors import JobLost
from workers import adapters
from workers.job import Job, JobHandler, Submit, job_task


class AdapterHandler(JobHandler[AdapterRequest, AdapterInput, AdapterResult]):
    request = AdapterRequest

    def load_input(self, job: Job, request: AdapterRequest) -> AdapterInput:
        found = job.resources.enter_context(adapters.unpacked(job, request.upload))
        if found is None:
            raise JobLost("the adapter's files are gone from the broker. Send them again.")
        return AdapterInput(*found, adapters.allocate(job, request.model, request.name))

    def submit(self, job: Job) -> Submit[AdapterRequest, AdapterInput, AdapterResult]:
        return job.runtime.engine.submit

    def finish(self, job: Job, request: AdapterRequest, result: AdapterResult) -> AdapterResult:
        known = {"rank": result.rank, "method": result.method, "source": "loaded"}
        job.runtime.persist(
            lambda: adapters.publish(job, request.model, request.name, result.version, known, promote=request.promote)
        )
        return result.model_copy(update={"usage": job.usage(result.usage)})


load = job_task(AdapterHandler())
