"""A step of the engine that never ends (a driver that hangs, a deadlock) holds every job of the worker. Its lease is
renewed all the same, because the process lives. So a thread watches, and ends the process: its supervisor starts
another, and the leases bring the jobs elsewhere. The record of each says what happened, for `stoker jobs dead`.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from stoker.broker import ledger
from stoker.broker.connection import connect
from workers.ending import end_process
from workers.services.background import Background
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0
#: Seconds that the broker has to take what is written into the jobs' records.
REPORT_WITHIN = 1.0


class Watchdog:
    """`limit`: seconds that one step may take; 0 turns it off. `end` ends the process."""

    def __init__(self, runtime: Runtime, limit: float, end: Callable[[], object] = end_process) -> None:
        self._runtime, self._limit, self._end = runtime, limit, end
        self._over = threading.Event()
        self._step: float | None = None
        self._seen = 0.0
        self._looked = time.monotonic()

    def start(self) -> None:
        if self._limit:
            Background("watchdog", self._round, stopped=self._over, every=LOOK_EVERY, end=self._end).start()

    def _round(self) -> None:
        if self._runtime.stopped.is_set():
            self._over.set()
        elif self.look():
            self._over.set()
            self._finish()

    def _finish(self) -> None:
        try:
            self._report()
        finally:
            # Also if the report fails: a worker whose engine hangs has to end.
            self._end()

    def look(self) -> bool:
        """Whether the step that runs now was seen running for longer than the limit.

        Time counts only as far as this thread was there to see it: a process that was frozen, or a Mac that slept, is
        not an engine that hangs.
        """
        now = time.monotonic()
        passed = min(now - self._looked, 2 * LOOK_EVERY)
        self._looked = now
        step = self._runtime.engine.step_began
        self._seen = self._seen + passed if step is not None and step == self._step else 0.0
        self._step = step
        return self._seen > self._limit

    def _report(self) -> None:
        jobs = self._runtime.jobs
        what = f"a step of the engine took longer than {self._limit:g} s"
        log.critical("%s: ending this worker. Its jobs go elsewhere: %s", what, ", ".join(jobs) or "none")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        try:
            with connect(self._runtime.settings, timeout=REPORT_WITHIN) as redis:
                pipeline = redis.pipeline(transaction=False)
                for job_id in jobs:
                    ledger.note_trouble(pipeline, job_id, what)
                replies = pipeline.execute(raise_on_error=False)
        except RedisError as error:
            log.warning("the records of the jobs do not say it: %s", error)
            return
        for job_id, reply in zip(jobs, replies, strict=True):
            if isinstance(reply, Exception):
                log.warning("the record of job %s does not say it: %s", job_id, reply)
