"""Who waits for a broker that loads its data: each command by itself, or a caller that has a time limit of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_own_patience: ContextVar[bool] = ContextVar("own_patience", default=False)


@contextmanager
def own_patience() -> Iterator[None]:
    """Inside, a broker that loads is an error at once: the caller has a time limit of its own, and asks again."""
    token = _own_patience.set(True)
    try:
        yield
    finally:
        _own_patience.reset(token)


def caller_waits() -> bool:
    """Whether the code that runs is inside `own_patience`."""
    return _own_patience.get()
