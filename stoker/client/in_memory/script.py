"""The answers that a test lays down for the jobs to come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stoker.client.in_memory.answers import (
    Answer,
    EmbedAnswer,
    GenerateAnswer,
    LoadAnswer,
    RerankAnswer,
    Scores,
    ScriptedEnding,
    Text,
    TrainAnswer,
    Vectors,
)
from stoker.contract import EmbedRequest, FinishReason, GenerateRequest
from stoker.errors import StokerError


class NotScripted(AssertionError):
    """The test has to say what becomes of this job. No `StokerError`: the code under test must not handle it."""


@dataclass
class _Planned:
    answer: Answer
    #: Jobs that it is still for; None: every further one.
    left: int | None


class Script:
    """Answers, used up in the order in which they were given; each kind of job has answers of its own.

    `error` is what the job ends with, behind the tokens or reports that were given. A job that `hangs` goes on until
    it is cancelled, or its deadline passes. `times`: jobs that the answer is for; None: every further one. Jobs that
    embed, rerank or load an adapter need no answer: they get vectors that depend on the text alone, the share of the
    query's words that a text has, and the next version.
    """

    def __init__(self) -> None:
        self._planned: dict[str, deque[_Planned]] = {}
        self._refusals: deque[StokerError] = deque()

    def embed(
        self,
        vectors: Vectors | Callable[[EmbedRequest], Vectors] = None,
        *,
        error: StokerError | None = None,
        hangs: bool = False,
        times: int | None = 1,
    ) -> None:
        """A row of numbers for each text, or a function that makes them of the request."""
        self._plan("embed", EmbedAnswer(ScriptedEnding(error, hangs), vectors), times)

    def rerank(
        self,
        scores: Scores | Callable[[EmbedRequest], Scores] = None,
        *,
        error: StokerError | None = None,
        hangs: bool = False,
        times: int | None = 1,
    ) -> None:
        """A number for each text, or a function that makes them of the request."""
        self._plan("rerank", RerankAnswer(ScriptedEnding(error, hangs), scores), times)

    def generate(
        self,
        text: Text | Callable[[GenerateRequest], Text] = "",
        *,
        finish_reason: FinishReason = "stop",
        error: StokerError | None = None,
        hangs: bool = False,
        times: int | None = 1,
    ) -> None:
        """A text, whose words become its tokens; the texts of its tokens; the tokens; or a function of the request."""
        self._plan("generate", GenerateAnswer(ScriptedEnding(error, hangs), text, finish_reason), times)

    def train(
        self,
        losses: Sequence[float] = (2.0, 1.0),
        *,
        error: StokerError | None = None,
        hangs: bool = False,
        times: int | None = 1,
    ) -> None:
        """A report for each loss, of which there is one at least; then the adapter's next version."""
        if not losses:
            raise ValueError("losses: none given; a run reports one at least.")
        self._plan("train", TrainAnswer(ScriptedEnding(error, hangs), tuple(losses)), times)

    def load(self, *, error: StokerError | None = None, hangs: bool = False, times: int | None = 1) -> None:
        """For `client.adapters.load`."""
        self._plan("adapters", LoadAnswer(ScriptedEnding(error, hangs)), times)

    def refuse(self, error: StokerError) -> None:
        """The next job is not taken: sending it raises `error`, such as `QueueFull` or `BrokerUnavailable`."""
        self._refusals.append(error)

    def _plan(self, kind: str, answer: Answer, times: int | None) -> None:
        if times is not None and times < 1:
            raise ValueError(f"times: {times} given; 1 or more, or None for every further job.")
        self._planned.setdefault(kind, deque()).append(_Planned(answer, times))

    def refusal(self) -> StokerError | None:
        """What the job that is sent now meets."""
        return self._refusals.popleft() if self._refusals else None

    def answer(self, kind: str) -> Answer:
        """The answer to the job of this kind that is sent now."""
        planned = self._planned.get(kind)
        if not planned:
            return _unplanned(kind)
        first = planned[0]
        if first.left is not None:
            first.left -= 1
            if not first.left:
                planned.popleft()
        return first.answer


def _unplanned(kind: str) -> Answer:
    if kind == "embed":
        return EmbedAnswer(ScriptedEnding())
    if kind == "rerank":
        return RerankAnswer(ScriptedEnding())
    if kind == "adapters":
        return LoadAnswer(ScriptedEnding())
    raise NotScripted(f"a {kind} job was sent, and no answer is left for it. Say which: client.script.{kind}(…).")
