"""The thread that writes prefixes to disk, so that neither a step nor a request waits for it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from stoker.errors import WorkerUnavailable

log = logging.getLogger(__name__)

#: Prefixes that may wait to be written; one more is left out.
WAITING = 64
#: How often a day the whole limit may be written. An SSD bears some hundred times its own size: prompts that come once
#: and never again must not wear it out.
TIMES_A_DAY = 24
_DAY = 24 * 3600.0


class Saving(Protocol):
    """A prefix that is worth being kept on the disk."""

    def save(self) -> None:
        """Raises `OSError`, and `WorkerUnavailable` when the engine stops."""
        ...


class Saver:
    """Does one after the other, in a thread that begins with `start` or the first."""

    def __init__(self) -> None:
        self._inbox: queue.Queue[Saving | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._main, name="prefixes to disk", daemon=True)
        self._in_trouble = False

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def note(self, saving: Saving) -> None:
        """Have it saved, unless too many wait. Returns at once."""
        self.start()
        try:
            self._inbox.put_nowait(saving)
        except queue.Full:
            log.debug("a prefix is not kept on disk: %d others wait", WAITING)

    def end(self, timeout: float) -> None:
        """What waits is left out."""
        while not self._inbox.empty():
            try:
                self._inbox.get_nowait()
            except queue.Empty:
                break
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _main(self) -> None:
        while (saving := self._inbox.get()) is not None:
            try:
                saving.save()
            except WorkerUnavailable:
                return
            except OSError as error:
                # The disk is full, or the folder may only be read: requests go on without.
                if not self._in_trouble:
                    log.warning("prefixes are not kept on disk now: %s", error)
                self._in_trouble = True
            except Exception:
                log.exception("a prefix could not be kept on disk")
            else:
                self._in_trouble = False


class Allowance:
    """Bytes that may be written: half of the limit at once, and the whole of it `TIMES_A_DAY`."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._rate, self._clock = limit / 2, limit * TIMES_A_DAY / _DAY, clock
        self._left, self._at = self._most, clock()

    def take(self, size: int) -> bool:
        """Whether so many bytes may be written now."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if size > self._left:
            return False
        self._left -= size
        return True
