"""Work for the engine's thread between two steps of its lanes, and work that needs a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from engine.platform.threads import leave, only_own
from stoker.errors import WorkerUnavailable

T = TypeVar("T")


class Errand(Generic[T]):
    """What the engine's thread does between two steps, for a caller in another thread who waits."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._future: Future[T] = Future()

    def run(self) -> None:
        """Do it. An error of it is the caller's."""
        try:
            made = self._call()
        except Exception as error:
            self.fail(error)
        else:
            if not self._future.done():
                self._future.set_result(made)

    def fail(self, error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)

    def result(self) -> T:
        """Wait for the end; raises what it failed of."""
        return self._future.result()


class OwnThread:
    """A thread for work that uses MLX next to the engine's. It lives until `end`: on an NVIDIA GPU, MLX ends the
    process where a thread that used it ends while another launches, which the engine's does all the time.

    What the work leaves must be evaluated: MLX's streams belong to the thread that made them.
    """

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ending, self._over = threading.Lock(), False

    def run(self, call: Callable[[], T]) -> T:
        """Do it there, and wait; raises what it raises, and `WorkerUnavailable` behind the end. For one caller at a
        time."""
        future: Future[T] = Future()
        with self._ending:
            if self._over:
                raise WorkerUnavailable("the worker is stopping: it loads no model any more.")
            self._inbox.put(lambda: _do(call, future))
            if self._thread.ident is None:
                self._thread.start()
        return future.result()

    def end(self, timeout: float) -> None:
        """Behind the work that it has, for which so many seconds are waited. No thread may launch meanwhile."""
        with self._ending:
            self._over = True
            self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _main(self) -> None:
        while self._goes_on():
            pass
        leave()

    def _goes_on(self) -> bool:
        """Do what comes next, and keep nothing of it; False at the end."""
        if (work := self._inbox.get()) is not None:
            work()
        return work is not None


def _do(call: Callable[[], T], future: Future[T]) -> None:
    try:
        # What it leaves in cycles takes memory of the device.
        with only_own():
            made = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(made)
