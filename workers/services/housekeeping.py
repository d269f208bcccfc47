"""Removing the training runs of this machine that are beyond what is kept, while the worker runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

from stoker.local.keeping import SentAgain, remove_over_limits
from stoker.settings import Settings

log = logging.getLogger(__name__)

#: Seconds between two rounds. The first is at the start.
EVERY = 3600.0


class Housekeeping:
    """Several workers of one STOKER_HOME may do it at once: what one of them removes, the others do not find."""

    def __init__(self, settings: Settings, again: SentAgain, now: Callable[[], float]) -> None:
        """`now`: seconds since the epoch."""
        self._settings, self._again, self._now = settings, again, now

    def round(self) -> None:
        for gone in remove_over_limits(self._settings, self._now(), self._again):
            log.info("%s: removed (%s), %.1f MB", gone.path, gone.reason, gone.bytes / 2**20)
