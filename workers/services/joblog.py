"""The log's two lines of each delivery of a job: when the worker begins with it, and when it is over."""

from __future__ import annotations

import logging

from stoker.logs.lines import JobLine
from workers.account import DeliveryEnd, JobAccount

log = logging.getLogger("stoker.jobs")

#: Ends that a person may want to look at.
_BAD = frozenset({DeliveryEnd.FAILED, DeliveryEnd.DEAD})


class JobLog:
    """An `Observer`."""

    def begun(self, account: JobAccount) -> None:
        JobLine("begun", *_about(account)).write(log, logging.INFO)

    def ended(self, account: JobAccount) -> None:
        made = account.outcome is DeliveryEnd.SUCCEEDED
        line = JobLine(
            "ended",
            *_about(account),
            duration=account.duration,
            outcome=account.outcome,
            error=account.error,
            prompt_tokens=account.prompt_tokens if made else None,
            tokens=account.tokens if made else None,
        )
        line.write(log, logging.WARNING if account.outcome in _BAD else logging.INFO)

    def close(self) -> None: ...


def _about(account: JobAccount) -> tuple[str, str, str, str, int, float]:
    return account.job, account.kind, account.model, account.client, account.attempt, account.wait
