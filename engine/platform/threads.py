"""The end of a thread that used MLX, and collections of what is in cycles, which hold up all others."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

#: A thread that ends switches the interpreter's collections off and on: one at a time, and nobody collects meanwhile.
_ENDING = threading.Lock()


def leave() -> None:
    """Free what MLX keeps for the calling thread; the last that the thread does with MLX.

    Without this the interpreter may abort at exit. MLX frees the compiled functions of the thread under its own lock,
    and for some of them it needs the interpreter's lock. A collection in another thread that meets a compiled function
    of this thread takes the two locks the other way round, and then the whole process waits for ever. So this thread
    collects first, and no other collection begins before the end.
    """
    with _ENDING:
        gc.collect()
        gc.disable()
        try:
            mx.clear_streams()
        finally:
            gc.enable()


@contextmanager
def only_own() -> Iterator[None]:
    """Within it no collection begins by itself, and at its end one looks at what was made since: to go through all
    objects of a worker holds the interpreter's lock for a tenth of a second."""
    with _ENDING:
        before = gc.isenabled()
        gc.disable()
    try:
        yield
    finally:
        with _ENDING:
            gc.collect(0)
            if before:
                gc.enable()


def collect() -> None:
    """Free what is in cycles, compiled functions among it, while no thread is in `leave`."""
    with _ENDING:
        gc.collect()
