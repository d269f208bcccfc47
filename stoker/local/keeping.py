"""How many training runs that ended are kept on this machine: by number, age and bytes. Workers apply it while they
run; `stoker clean` does the same by hand.

Nothing goes that may be needed: a run that has not ended, one that is pinned, one that failed and was sent again, and
of each adapter the run that ended last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from stoker.broker import keys
from stoker.errors import InvalidRequest
from stoker.files.durable import remove_folder
from stoker.local.runs import DONE, StoredRun, read_run, stored_runs
from stoker.local.storage import Leftover, bytes_of
from stoker.settings import Settings

log = logging.getLogger(__name__)
DAY = 86400.0
#: Says of a run that ended whether its job goes on from its checkpoints.
SentAgain: TypeAlias = Callable[[StoredRun], bool]


def sent_again(redis: Any) -> SentAgain:
    """By what the broker has: a job that failed and is retried has no result, and waits, or runs somewhere."""

    def asked(run: StoredRun) -> bool:
        if run.status == DONE:
            return False
        return bool(redis.exists(keys.job(run.id))) and not redis.exists(keys.result(run.id))

    return asked


def removable(root: Path) -> list[StoredRun]:
    """The runs that may go, the oldest first. One that cannot be read stays, and hinders no other."""
    ended = sorted((run for run in _readable(root) if run.has_ended), key=lambda run: run.changed)
    newest = {_adapter(run): run.id for run in ended}
    return [run for run in ended if not run.is_pinned and run.id != newest[_adapter(run)]]


def ended_before(settings: Settings, before: float, again: SentAgain) -> list[Leftover]:
    """Runs that may go and ended before that moment, in seconds since the epoch."""
    return [
        Leftover(run.folder, f"a run of {run.asked['name']} that ended ({run.status})", bytes_of(run.folder))
        for run in removable(settings.runs)
        if run.changed < before and not again(run)
    ]


def over_limits(settings: Settings, now: float, again: SentAgain) -> list[Leftover]:
    """The runs by which the limits are passed, the oldest first. `now`: seconds since the epoch."""
    ended = [run for run in _readable(settings.runs) if run.has_ended]
    sizes = {run.id: bytes_of(run.folder) for run in ended}
    count, total, found = len(ended), sum(sizes.values()), []
    for run in removable(settings.runs):
        old = run.changed < now - settings.keep_days * DAY
        if not (old or count > settings.keep_runs or total > settings.keep_megabytes * 2**20) or again(run):
            continue
        count, total = count - 1, total - sizes[run.id]
        found.append(Leftover(run.folder, f"a run of {run.asked['name']} beyond what is kept", sizes[run.id]))
    return found


def remove_over_limits(settings: Settings, now: float, again: SentAgain) -> list[Leftover]:
    """Remove them; return those that went."""
    return [leftover for leftover in over_limits(settings, now, again) if remove_ended(leftover.path)]


def remove_ended(folder: Path) -> bool:
    """Whether a run that was removable went. One that another process removes, pins or begins anew since is left to it.
    Raises `OSError`."""
    try:
        run = read_run(folder)
        if run.has_ended and not run.is_pinned:
            remove_folder(folder)
            return True
    except (InvalidRequest, FileNotFoundError):
        pass
    return False


def _adapter(run: StoredRun) -> tuple[str, str]:
    return str(run.asked.get("model")), str(run.asked["name"])


def _readable(root: Path) -> Iterator[StoredRun]:
    return stored_runs(root, lambda error: log.debug("%s", error))
