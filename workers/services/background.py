"""The threads of a worker in addition to Celery's and the engine's: each outlives every error, or ends the worker.

A worker whose thread is gone looks alive and is not: its jobs hang, or its leases run out. So a round of a thread may
fail, by the broker's absence or by a value that another program wrote, and the next one comes all the same; what ends
the thread itself ends the process, and a supervisor starts another.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from redis.exceptions import RedisError

from stoker.broker.connection import passes
from stoker.logs.redaction import shown
from workers.ending import EXIT_CODE, end_process

log = logging.getLogger(__name__)

#: Rounds with the same trouble between two lines of the log.
SAY_EVERY = 100
#: Seconds that a round waits at least behind one that failed: a broker that answers may refuse each at once.
PAUSE = 1.0


class Background:
    """A thread that does its `rounds` in order, again and again, `every` seconds apart, until `stopped` is set.

    Each of the rounds fails alone: `failed` hears of it, and so does the log. `PAUSE` lies behind it at least. `end`
    ends the process.
    """

    def __init__(
        self,
        name: str,
        *rounds: Callable[[], object],
        stopped: threading.Event,
        every: float = 0.0,
        failed: Callable[[], object] = lambda: None,
        end: Callable[[], object] = end_process,
    ) -> None:
        self._name, self._rounds, self._stopped, self._every = name, rounds, stopped, every
        self._failed, self._end = failed, end
        #: The trouble of each round that failed last, and how often in a row it has been the same.
        self._troubles: dict[int, tuple[str, int]] = {}
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> None:
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            while not self._stopped.is_set():
                failed = self.turn()
                self._stopped.wait(max(self._every, PAUSE) if failed else self._every)
        except BaseException:
            log.critical(
                "the thread %r has ended: ending this worker (exit code %d). Its jobs go elsewhere.",
                self._name,
                EXIT_CODE,
                exc_info=True,
            )
            self._end()

    def turn(self) -> bool:
        """Every round once; whether one of them failed."""
        failed = False
        for number, work in enumerate(self._rounds):
            try:
                work()
            except Exception as error:
                failed = True
                self._failed()
                self._say(number, error)
            else:
                self._troubles.pop(number, None)
        return failed

    def _say(self, number: int, error: Exception) -> None:
        """Once for the same trouble, and then now and then: a value that stays wrong must not fill the disk."""
        said, count = self._troubles.get(number, ("", 0))
        trouble = f"{type(error).__name__}: {error}"
        count = count + 1 if trouble == said else 0
        self._troubles[number] = trouble, count
        if count % SAY_EVERY:
            return
        if isinstance(error, RedisError) and passes(error):
            log.warning("the thread %r waits for the broker: %s", self._name, error)
        else:
            # What the broker refuses is no defect of this code: its words say what is wrong there.
            defect = None if isinstance(error, RedisError) else error
            said = shown(error)
            log.error("a round of the thread %r failed; the next one comes: %s", self._name, said, exc_info=defect)
