"""One question to the broker with its answer's type, not sent yet: so that a blocking client, an asyncio client and a
pipeline send the same one, and its reply is read in one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Call(Generic[R_co]):
    """`send`: takes a client or a pipeline and returns what that returns. `parse`: what the reply means."""

    send: Callable[[Any], Any]
    parse: Callable[[Any], R_co]

    def on(self, redis: Any) -> R_co:
        """Ask by a blocking client."""
        return self.parse(self.send(redis))

    async def on_async(self, redis: Any) -> R_co:
        """Ask by an asyncio client."""
        return self.parse(await self.send(redis))
