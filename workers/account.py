"""What a worker knows of a job that it has or had, in one place for all who report it: the log, traces, counts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from stoker.broker.ledger.replies import Claim
from stoker.contract import EmbedReply, GenerateResult, TrainResult
from stoker.contract.base import Message
from stoker.contract.kinds import EMBED, GENERATE, TRAIN
from stoker.contract.names import Rule, follows

if TYPE_CHECKING:
    from engine.ticket import Ticket

log = logging.getLogger(__name__)


class DeliveryEnd(StrEnum):
    """How a delivery of a job is over at this worker. Behind the last four, the job itself goes on or had ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: It is a dead letter.
    DEAD = "dead"
    #: It went back to its queue: the worker stops, or has no memory for it just now.
    RETURNED = "returned"
    #: It went to another worker, which has what its prompt begins with.
    PASSED_ON = "passed_on"
    #: Another worker owns it by now.
    FENCED = "fenced"
    #: There was nothing to do: it had ended, or runs elsewhere.
    DROPPED = "dropped"


@dataclass(frozen=True)
class Phase:
    """A part of a job's time at this worker; `began` and `ended` by `time.monotonic`."""

    name: str
    began: float
    ended: float


class _Timed:
    """A class, and no generator: each job passes here five times."""

    __slots__ = ("_began", "_name", "_phases")

    def __init__(self, phases: list[Phase], name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._phases.append(Phase(self._name, self._began, time.monotonic()))


@dataclass
class JobAccount:
    """One delivery of a job, and nothing of what was asked for or made.

    `client`, `attempt`, `wait` (seconds from submission to the claim), `passed` (another worker had it first, and
    passed it on) and the trace are known once the job is claimed;
    `prompt_tokens` and `tokens` (generated; of other kinds, through the model) once it has succeeded. `error`: the
    class of what it ended with. `began`, `ended`: of the delivery, by `time.monotonic`.
    """

    job: str
    kind: str
    model: str
    client: str = ""
    attempt: int = 1
    wait: float = 0.0
    passed: bool = False
    traceparent: str = ""
    tracestate: str = ""
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    outcome: DeliveryEnd | None = None
    error: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    phases: list[Phase] = field(default_factory=list)

    @property
    def duration(self) -> float:
        return (self.ended or time.monotonic()) - self.began

    def phase(self, name: str) -> _Timed:
        """Note the phase that the `with` block is."""
        return _Timed(self.phases, name)

    def claimed(self, claim: Claim) -> None:
        self.wait, self.attempt, self.passed = claim.age, claim.attempt, claim.passed
        # What no client of ours wrote there is shown to nobody.
        self.client = claim.client if follows(Rule.NAME, claim.client) else "?"
        self.traceparent, self.tracestate = claim.traceparent, claim.tracestate

    def ran(self, ticket: Ticket[Any]) -> None:
        """Take the engine's phases from the job's ticket. The engine may be at it still, if the worker ends."""
        ended = ticket.ended or time.monotonic()
        started, first = ticket.started, ticket.first_entry
        self.phases.append(Phase("engine queue", ticket.submitted, started or ended))
        if started is None:
            return
        if self.kind != GENERATE.name:
            self.phases.append(Phase(_WORK.get(self.kind, "load adapter"), started, ended))
            return
        self.phases.append(Phase("prefill", started, first or ended))
        if first is not None:
            self.phases.append(Phase("decode", first, ended))

    def made(self, result: Message) -> None:
        """Take the counts from what the job made."""
        if isinstance(result, GenerateResult):
            self.prompt_tokens, self.tokens = result.usage.prompt_tokens, result.usage.completion_tokens
        elif isinstance(result, EmbedReply):
            self.tokens = result.usage.prompt_tokens
        elif isinstance(result, TrainResult):
            self.tokens = result.tokens

    def over(self, outcome: DeliveryEnd, error: BaseException | None = None) -> None:
        self.outcome, self.error = outcome, type(error).__name__ if error is not None else ""


_WORK = {EMBED.name: "embed", TRAIN.name: "train"}


class Observer(Protocol):
    """Observes each delivery, in the thread that runs it. What it raises is logged, and hurts no job."""

    def begun(self, account: JobAccount) -> None:
        """The job was claimed, and is to run."""

    def ended(self, account: JobAccount) -> None:
        """The delivery is over: `outcome`, `duration` and `phases` are known."""

    def close(self) -> None:
        """The worker ends."""


class Observers:
    """Reports to each of them, also after another failed."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def begun(self, account: JobAccount) -> None:
        for observer in self._observers:
            _report(observer.begun, account)

    def ended(self, account: JobAccount) -> None:
        account.ended = time.monotonic()
        for observer in self._observers:
            _report(observer.ended, account)

    def close(self) -> None:
        for observer in self._observers:
            observer.close()


def _report(observe: Callable[[JobAccount], None], account: JobAccount) -> None:
    try:
        observe(account)
    except Exception:
        log.exception("job %s could not be accounted for", account.job)
