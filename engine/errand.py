"""Work for the engine's thread between two steps of its lanes, and work that needs a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Generic, TypeVar

from engine.platform.threads import leave

T = TypeVar("T")


class Errand(Generic[T]):
    """What the engine's thread does between two steps, a slice at a time, for a caller in another thread who waits.

    `slices` yields after each part, so that running streams have their turn, and returns what the caller gets.
    """

    def __init__(self, slices: Generator[None, None, T]) -> None:
        self._slices = slices
        self._future: Future[T] = Future()

    def turn(self) -> bool:
        """Do one slice; whether another is left. An error of it is the caller's."""
        try:
            next(self._slices)
            return True
        except StopIteration as end:
            if not self._future.done():
                self._future.set_result(end.value)
        except Exception as error:
            self.fail(error)
        return False

    def fail(self, error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)

    def result(self) -> T:
        """Wait for the end; raises what it failed of."""
        return self._future.result()


def at_once(call: Callable[[], T]) -> Generator[None, None, T]:
    """`call` as the one slice of an errand."""
    yield from ()
    return call()


def in_own_thread(name: str, call: Callable[[], T]) -> T:
    """Run `call`, which uses MLX, in a thread that ends with it, and wait. What it leaves must be evaluated: MLX's
    streams belong to the thread that made them."""
    future: Future[T] = Future()

    def main() -> None:
        try:
            made = call()
        except BaseException as error:
            leave()
            future.set_exception(error)
        else:
            leave()
            future.set_result(made)

    threading.Thread(target=main, name=name, daemon=True).start()
    return future.result()
