"""What the engine asks of a lane: one kind of work on one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from engine.ticket import StepOutput, Ticket
from stoker.contract import Request

Q = TypeVar("Q", bound=Request, contravariant=True)
D = TypeVar("D", contravariant=True)
W = TypeVar("W")
R = TypeVar("R")


class Held(Protocol):
    """A job of a lane, or a part of one."""

    @property
    def ticket(self) -> Ticket[Any]: ...


class Lane(Protocol[Q, D, W, R]):
    """Q: the lane's requests; D: what a job has besides; W: the work that the lane makes of both; R: the results.

    `prepare` runs in the caller's thread and may raise, and `busy` may be asked in any; everything else runs in the
    engine's thread.
    """

    kind: str

    @property
    def busy(self) -> bool:
        """Whether there is work for `run`."""
        ...

    @property
    def held(self) -> Sequence[Held]:
        """Every job that was admitted and has not ended."""
        ...

    def prepare(self, ticket: Ticket[R], request: Q, data: D) -> W:
        """Check a request against the model and make it work for `admit`."""
        ...

    def admit(self, work: W) -> None: ...

    def drop_stopped(self) -> None:
        """Free what stopped jobs hold, and end them."""
        ...

    def run(self, *, lookahead: bool = True) -> StepOutput:
        """One step, as short as the work allows. `lookahead`: whether the lane may leave a pass of its next step on the
        device: not while others wait for the device, who also want its step short."""
        ...

    def fail_all(self, error: BaseException) -> None:
        """End every job of this lane with `error` and start clean."""
        ...


#: A lane among others. `Engine.submit` says which requests and data go together; the request's kind finds the lane.
AnyLane: TypeAlias = Lane[Any, Any, Any, Any]
