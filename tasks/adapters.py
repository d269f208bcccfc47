"""Loading an adapter that was made elsewhere: the engine checks it, this registers it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from celery import Task, shared_task

from stoker.broker import keys
from stoker.contract import AdapterRequest, AdapterResult
from stoker.contract.bundle import AdapterInput
from stoker.contract.kinds import ADAPTERS
from stoker.errors import JobLost
from workers import adapters
from workers.frame import JobTask, Run, complete, run_job


@shared_task(name=ADAPTERS.task, base=JobTask, bind=True)
def load(self: Task) -> dict[str, Any]:
    with ExitStack() as folders:

        def fetch(run: Run, request: AdapterRequest) -> Any:
            found = folders.enter_context(adapters.unpacked(run, request.upload))
            if found is None:
                raise JobLost("the adapter's files are gone from the broker. Send them again.")
            return AdapterInput(*found, adapters.allocate(run, request.model, request.name))

        return run_job(self, AdapterRequest, _finish, fetch)


def _finish(run: Run, request: AdapterRequest, result: AdapterResult) -> AdapterResult:
    known = {"rank": result.rank, "method": result.method, "source": "loaded"}
    run.runtime.persist(
        lambda: adapters.publish(run, request.model, request.name, result.version, known, promote=request.promote)
    )
    run.runtime.persist(lambda: run.runtime.redis.delete(keys.blob(request.upload)))
    return result.model_copy(update={"usage": complete(result.usage, run)})
