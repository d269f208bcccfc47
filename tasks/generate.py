"""Generation: the engine streams the tokens, this returns the whole."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task

from stoker.broker import keys
from stoker.contract import GenerateRequest, GenerateResult, StreamToken
from stoker.contract.kinds import GENERATE
from workers import adapters
from workers.frame import JobTask, Run, complete, run_job


@shared_task(name=GENERATE.task, base=JobTask, bind=True)
def generate(self: Task) -> dict[str, Any]:
    return run_job(self, GenerateRequest, _finish, _published, _pin)


def _pin(run: Run, request: GenerateRequest) -> GenerateRequest:
    """A job keeps the version of its adapter that it began with, also under another owner."""
    if request.adapter is None:
        return request
    return request.model_copy(update={"adapter": adapters.pinned(run, request.model, request.adapter)})


def _published(run: Run, request: GenerateRequest) -> list[StreamToken]:
    """The tokens that an earlier owner published: the engine goes on behind them."""
    if not run.claim.resumed:
        return []
    rows = run.runtime.redis.xrange(keys.stream(run.job_id))
    return [StreamToken.model_validate_json(fields[b"entry"]) for _, fields in rows]


def _finish(run: Run, request: GenerateRequest, result: GenerateResult) -> GenerateResult:
    return result.model_copy(update={"usage": complete(result.usage, run)})
