"""The frame that every job runs in: decode, run, tell how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from celery import Task
from celery.exceptions import Ignore, Reject

from stoker import keys
from stoker.contract import Usage, decode, encode
from stoker.contract.base import Message
from stoker.errors import JobCancelled, StokerError, WorkerUnavailable, to_wire
from workers.lanes import LaneRequest
from workers.runtime import Runtime, current

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class JobTask(Task):
    """The base of the tasks: one place in a lane, errors of our own tree without a traceback in the log."""

    Request = LaneRequest
    throws = (StokerError,)


def run_job(
    task: Task,
    payload: Any,
    message: type[M],
    finish: Callable[[Runtime, M, Any], Message],
    fetch: Callable[[Runtime, M], bytes | None] = lambda runtime, request: None,
) -> dict[str, Any]:
    """Run one job on the engine and return its encoded result.

    `fetch` gets data that the request only names; `finish` makes the result of what the engine returned. A cancelled
    job ends as Celery's REVOKED; a stopping worker's job goes back to the queue; any other error reaches the client as
    a class of `stoker.errors`.
    """
    runtime, job_id = current(), task.request.id
    try:
        request = decode(message, payload)
        value = _on_engine(runtime, job_id, request, runtime.persist(lambda: fetch(runtime, request)))
        runtime.publisher.flush()
        result = finish(runtime, request, value)
        runtime.persist(lambda: _settle(runtime, job_id))
        return _fields(result)
    except JobCancelled:
        _mark_revoked(task, job_id)
        runtime.persist(lambda: _settle(runtime, job_id))
        raise Ignore from None
    except WorkerUnavailable as error:
        log.info("job %s goes back to the queue: %s", job_id, error)
        raise Reject(str(error), requeue=True) from None
    except StokerError:
        runtime.persist(lambda: _settle(runtime, job_id))
        raise
    except Exception as error:
        log.exception("job %s failed", job_id)
        runtime.persist(lambda: _settle(runtime, job_id))
        raise to_wire(error) from error


def _on_engine(runtime: Runtime, job_id: str, request: Any, data: bytes | None) -> Any:
    ticket = runtime.engine.submit(job_id, request, data)
    with runtime.running(ticket):
        # After the ticket can be found: a cancel that came before is seen here, one that comes later finds it.
        runtime.persist(lambda: runtime.cancel_if_asked([job_id]))
        return ticket.result()


def _settle(runtime: Runtime, job_id: str) -> None:
    """What stands for the job lives as long as its result from now on."""
    pipeline = runtime.redis.pipeline()
    pipeline.expire(keys.job(job_id), keys.RESULT_TTL)
    pipeline.delete(keys.cancel(job_id))
    pipeline.execute()


def _mark_revoked(task: Task, job_id: str) -> None:
    task.backend.mark_as_revoked(job_id, "cancelled", request=task.request)
    # Flower shows STARTED for ever without this event.
    task.send_event("task-revoked", terminated=True, signum=None, expired=False)


def _fields(result: Message) -> dict[str, Any]:
    fields = encode(result)
    del fields["contract"]
    return fields


def complete(usage: Usage, runtime: Runtime, job_id: str) -> Usage:
    """Add what only the worker knows: its name, and how long the job waited."""
    submitted = runtime.redis.hget(keys.job(job_id), "submitted")
    waited = max(0.0, time.time() - float(submitted) - usage.run_seconds) if submitted else 0.0
    return usage.model_copy(update={"worker": runtime.name, "queued_seconds": waited})
