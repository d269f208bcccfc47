"""Commands that are collected and sent together, as redis-py's two clients take them: what this package puts in."""

from __future__ import annotations

from typing import Protocol, TypeVar

P_co = TypeVar("P_co", bound="Pipeline", covariant=True)


class Pipeline(Protocol):
    """A pipeline of either client. What `execute` returns is the client's own: replies, or an awaitable of them."""

    def get(self, name: str) -> object: ...

    def xrange(self, name: str, min: str, *, count: int) -> object: ...

    def setrange(self, name: str, offset: int, value: bytes) -> object: ...

    def expire(self, name: str, time: int) -> object: ...

    def unlink(self, name: str) -> object: ...


class Pipelines(Protocol[P_co]):
    """A client, as far as it makes pipelines."""

    def pipeline(self) -> P_co: ...


def of_another_type(reply: Exception) -> bool:
    """Whether the broker refused a command of a pipeline for the type of its key. By its words: redis-py is loaded when
    a client is made."""
    return str(reply).startswith("WRONGTYPE")
