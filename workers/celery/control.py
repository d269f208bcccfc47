"""Celery's control messages that mean something else here: a job that is revoked is cancelled through the ledger, and
of the broker only its address is shown.

Celery would keep the ids in each worker's memory and drop the messages of these jobs when they come: a job that waits
would stay where it is, and one whose message was dropped would be sent again without end.

All who watch hear what is said of the broker. Celery would give them the password in some forms of its URL. Behind
sentinels it has no answer at all, since their options hold what JSON cannot, and control messages that come meanwhile
are lost.
"""

from __future__ import annotations

import re
from typing import Any

from celery.worker import control
from celery.worker.control import Panel

from workers.context import WorkerContext

Reply = dict[str, str]

LOGIN = re.compile(r"//[^\s'@]*@")
#: Settings of Celery's that hold the broker's login.
URLS = frozenset({"broker_url", "broker_read_url", "broker_write_url", "result_backend"})


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


def stats(state: Any, **_: object) -> dict[str, Any]:
    """As Celery's, with the broker's address in place of its connection."""
    found: dict[str, Any] = control.stats(state)
    return {**found, "broker": {"url": _shown(state)}}


def conf(state: Any, with_defaults: bool = False, **_: object) -> dict[str, Any]:
    """As Celery's, with the broker's address in place of its URLs."""
    found: dict[str, Any] = control.conf(state, with_defaults)
    return {name: _shown(state) if value and name in URLS else value for name, value in found.items()}


def report(state: Any, **_: object) -> Reply:
    """As Celery's, without the logins of its URLs."""
    found: Reply = control.report(state)
    return {what: LOGIN.sub("//***@", text) for what, text in found.items()}


def _shown(state: Any) -> str:
    context: WorkerContext = state.app.context
    return context.settings.address.shown


def install() -> None:
    """Answer these in place of Celery's own; who may be asked for what stays in Celery's table."""
    for command in (revoke, terminate, revoke_by_stamped_headers, stats, conf, report):
        Panel.data[command.__name__] = command
