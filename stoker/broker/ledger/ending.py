"""How a job ended, as Celery's own backend writes it, so that Celery's tools can read it; `outcome.py` reads it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


@dataclass(frozen=True)
class Ending:
    """The fields of the record. `result`: what the job made, or the class and the message of its error."""

    status: Literal["SUCCESS", "FAILURE", "REVOKED"]
    task_id: str
    result: dict[str, Any]
    date_done: str = field(default_factory=_now)
    traceback: None = None
    children: tuple[()] = ()

    def text(self) -> str:
        return json.dumps(vars(self))


def success(job_id: str, result: dict[str, Any]) -> Ending:
    return Ending("SUCCESS", job_id, result)


#: What stands in the place of a result that was discarded.
DISCARDED = {"discarded": True}
#: How the record of a job that succeeded begins.
BEGINNING = '{"status": "SUCCESS", '


def discarded(job_id: str) -> Ending:
    """Of a job whose result was taken out of the broker."""
    return success(job_id, DISCARDED)


def failure(job_id: str, error: BaseException) -> Ending:
    kind = type(error)
    return Ending("FAILURE", job_id, _error(kind.__name__, str(error), kind.__module__))


def revoked(job_id: str) -> Ending:
    """Of a job that was cancelled."""
    return Ending("REVOKED", job_id, _error("TaskRevokedError", "cancelled", "celery.exceptions"))


def _error(name: str, message: str, module: str) -> dict[str, Any]:
    return {"exc_type": name, "exc_message": [message], "exc_module": module}
