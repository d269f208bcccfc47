"""What one step of a lane made, on its way to those who wait: entries first, then results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from engine.ticket import Entry, StepOutput, Ticket

log = logging.getLogger(__name__)

#: Takes the entries of a step and returns; or raises, and has taken none.
Publish = Callable[[list[Entry]], None]


def deliver(output: StepOutput, publish: Publish) -> None:
    """Publish the entries, then end the jobs that are done. A job whose entries are not taken ends with that error."""
    if output.entries:
        now = time.monotonic()
        for ticket, _ in output.entries:
            ticket.first_entry = ticket.first_entry or now
        try:
            publish([(ticket.job_id, entry) for ticket, entry in output.entries])
        except Exception:
            log.exception("a step's entries were not taken; each job's are tried alone")
            _publish_each(output, publish)
    for ticket, value in output.ended:
        ticket.resolve(value)


def _publish_each(output: StepOutput, publish: Publish) -> None:
    by_job: dict[Ticket[Any], list[Entry]] = {}
    for ticket, entry in output.entries:
        by_job.setdefault(ticket, []).append((ticket.job_id, entry))
    for ticket, entries in by_job.items():
        try:
            publish(entries)
        except Exception as error:
            ticket.abort(error)
