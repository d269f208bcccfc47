"""What the engine asks of a lane: one kind of work on one model."""

from __future__ import annotations

from typing import Any, Protocol

from engine.ticket import StepOutput, Ticket


class Lane(Protocol):
    """`prepare` runs in the caller's thread and may raise; everything else runs in the engine's thread."""

    kind: str

    @property
    def busy(self) -> bool:
        """Whether there is work for `run`."""
        ...

    def prepare(self, ticket: Ticket, request: Any, data: Any) -> Any:
        """Check a request against the model and make it work for `admit`."""
        ...

    def admit(self, work: Any) -> None: ...

    def drop_stopped(self) -> None:
        """Free what stopped jobs hold, and end them."""
        ...

    def run(self) -> StepOutput:
        """One step, as short as the work allows."""
        ...

    def fail_all(self, error: BaseException) -> None:
        """End every job of this lane with `error` and start clean."""
        ...
