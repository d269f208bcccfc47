"""Celery's control messages that mean something else here: a job that is revoked is cancelled through the ledger.

Celery would keep the ids in each worker's memory and drop the messages of these jobs when they come: a job that waits
would stay where it is, and one whose message was dropped would be sent again without end.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import Panel

from workers.context import WorkerContext

Reply = dict[str, str]


def revoke(state: Any, task_id: object = None, **_: object) -> Reply:
    """Cancel jobs wherever they are. Celery's `terminate` and `signal` change nothing: a job that runs stops too."""
    context: WorkerContext = state.app.context
    given = list(task_id) if isinstance(task_id, list | tuple | set) else [task_id]
    taken = context.revocations.ask(given)
    if taken < len(given):
        left = len(given) - taken
        return {"error": f"{left} of {len(given)} ids are no job ids, or too many at once; {taken} are cancelled."}
    return {"ok": f"{taken} jobs are cancelled, if the broker knows them"}


def terminate(state: Any, signal: object = None, task_id: object = None, **_: object) -> Reply:
    return revoke(state, task_id)


def revoke_by_stamped_headers(state: Any, **_: object) -> Reply:
    return {"error": "jobs have no stamped headers: revoke them by their ids."}


def install() -> None:
    """Answer these in place of Celery's own; who may be asked for what stays in Celery's table."""
    for command in (revoke, terminate, revoke_by_stamped_headers):
        Panel.data[command.__name__] = command
