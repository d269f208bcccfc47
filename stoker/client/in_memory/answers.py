"""What a job in memory makes of one scripted answer: the entries of its stream, and its end."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from stoker.contract import (
    Completion,
    EmbedRequest,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    StreamToken,
    TrainReport,
    TrainRequest,
    TrainResult,
    Usage,
    vectors,
)
from stoker.contract.reasoning import reasoning_tokens
from stoker.errors import InvalidRequest, StokerError

if TYPE_CHECKING:
    import numpy as np

#: Numbers of a vector that no test laid down.
DIM = 8
WORKER = "in-memory"
USAGE = Usage(worker=WORKER)

#: Rows of numbers, one for each text; None: vectors that depend on the text alone. A function gets the request.
Vectors: TypeAlias = "Sequence[Sequence[float]] | np.ndarray | None"
#: A number for each text; None: scores that depend on the query and the text alone. A function gets the request.
Scores: TypeAlias = "Sequence[float] | np.ndarray | None"
#: A text, which is cut into words; its pieces; or the tokens themselves.
Text: TypeAlias = str | Sequence[str] | Sequence[StreamToken]


@dataclass(frozen=True)
class ScriptedEnding:
    """How a job ends: with `error`; never, where it `hangs`; else with what it made."""

    error: StokerError | None = None
    hangs: bool = False


@dataclass(frozen=True)
class EmbedAnswer:
    ending: ScriptedEnding
    vectors: Vectors | Callable[[EmbedRequest], Vectors] = None

    def blob(self, request: EmbedRequest) -> bytes:
        """The vectors as they would travel. Raises `InvalidRequest` for rows that do not fit the texts."""
        import numpy as np

        given = self.vectors(request) if callable(self.vectors) else self.vectors
        rows = [vector_of(text) for text in request.texts] if given is None else given
        array = np.asarray(rows, dtype=np.float32)
        if array.ndim != 2 or len(array) != len(request.texts):
            raise InvalidRequest(
                f"script.embed: vectors of shape {array.shape} given for {len(request.texts)} texts; expected a row of "
                "numbers for each text."
            )
        return vectors.save(array[:, : request.dimensions], request.dtype)


def vector_of(text: str) -> np.ndarray:
    """A vector of length 1 that depends on the text alone."""
    import numpy as np

    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    vector = np.random.default_rng(seed).standard_normal(DIM)
    return vector / np.linalg.norm(vector)


@dataclass(frozen=True)
class RerankAnswer:
    ending: ScriptedEnding
    scores: Scores | Callable[[EmbedRequest], Scores] = None

    def blob(self, request: EmbedRequest) -> bytes:
        """The scores as they would travel. Raises `InvalidRequest` for those that do not fit the texts."""
        import numpy as np

        given = self.scores(request) if callable(self.scores) else self.scores
        scores = [score_of(request.query or "", text) for text in request.texts] if given is None else given
        array = np.asarray(scores, dtype=np.float32)
        if array.shape != (len(request.texts),):
            raise InvalidRequest(
                f"script.rerank: scores of shape {array.shape} given for {len(request.texts)} texts; expected a number "
                "for each text."
            )
        return vectors.save(array[:, None], request.dtype)


def score_of(query: str, text: str) -> float:
    """A number from 0 to 1 that depends on the two alone: how many words of the query the text has."""
    words = set(re.findall(r"\w+", query.lower()))
    return len(words & set(re.findall(r"\w+", text.lower()))) / max(1, len(words))


@dataclass(frozen=True)
class GenerateAnswer:
    ending: ScriptedEnding
    text: Text | Callable[[GenerateRequest], Text] = ""
    finish_reason: FinishReason = "stop"

    def tokens(self, request: GenerateRequest) -> tuple[StreamToken, ...]:
        """Every token of the job: completion by completion, `max_tokens` of each at most."""
        given = self.text(request) if callable(self.text) else self.text
        pieces = _pieces(given)
        if isinstance(pieces, tuple):
            return pieces
        made: list[StreamToken] = []
        for completion in range(request.n):
            reason = "length" if len(pieces) > request.max_tokens else self.finish_reason
            kept = pieces[: request.max_tokens]
            for position, piece in enumerate(kept):
                last = position == len(kept) - 1 and self.ending == ScriptedEnding()
                made.append(_token(len(made), position, piece, completion, reason if last else None))
        return tuple(made)


def _pieces(given: Text) -> list[str] | tuple[StreamToken, ...]:
    if isinstance(given, str):
        return re.findall(r"\s*\S+|\s+$", given)
    tokens = tuple(item for item in given if isinstance(item, StreamToken))
    pieces = [item for item in given if isinstance(item, str)]
    if (tokens and pieces) or len(tokens) + len(pieces) != len(given):
        raise InvalidRequest("script.generate: expected a text, a list of texts, or a list of StreamToken.")
    return tokens or pieces


def _token(index: int, token_id: int, text: str, completion: int, reason: FinishReason | None) -> StreamToken:
    return StreamToken(
        index=index, token_id=token_id, text=text, logit=0.0, logprob=0.0, probability=1.0, completion=completion,
        finish_reason=reason, is_eos=reason == "stop",
    )  # fmt: skip


def generated(request: GenerateRequest, tokens: Sequence[StreamToken]) -> GenerateResult:
    """What a job that made these tokens ends with."""
    of = [[token for token in tokens if token.completion == index] for index in range(request.n)]
    first, *others = [_completion(made, request.functions) for made in of]
    thought = sum(_reasoning_tokens(made) for made in of)
    usage = Usage(worker=WORKER, completion_tokens=len(tokens), reasoning_tokens=thought)
    return GenerateResult(
        model=request.model, adapter=request.adapter, others=tuple(others), usage=usage, **dict(first)
    )


def _in_reasoning(tokens: Sequence[StreamToken]) -> bool:
    return any(token.in_reasoning for token in tokens[:1])


def _reasoning_tokens(tokens: Sequence[StreamToken]) -> int:
    return reasoning_tokens([token.text for token in tokens], in_reasoning=_in_reasoning(tokens))


def _completion(tokens: Sequence[StreamToken], functions: tuple[str, ...]) -> Completion:
    return Completion(
        text="".join(token.text for token in tokens),
        token_ids=tuple(token.token_id for token in tokens),
        finish_reason=(tokens[-1].finish_reason if tokens else None) or "stop",
        in_reasoning=_in_reasoning(tokens),
        functions=functions,
    )


@dataclass(frozen=True)
class TrainAnswer:
    ending: ScriptedEnding
    losses: Sequence[float] = (2.0, 1.0)

    def reports(self, request: TrainRequest) -> tuple[TrainReport, ...]:
        """A report for each loss."""
        return tuple(
            TrainReport(
                index=index, step=index + 1, steps=request.steps, loss=loss, learning_rate=request.learning_rate,
                gradient_norm=1.0, tokens=index + 1, tokens_per_second=1.0,
                last=index == len(self.losses) - 1 and self.ending == ScriptedEnding(),
            )
            for index, loss in enumerate(self.losses)
        )  # fmt: skip


def trained(request: TrainRequest, version: int, reports: Sequence[TrainReport]) -> TrainResult:
    """What a run of these reports ends with."""
    return TrainResult(
        model=request.model, adapter=request.name, version=version, steps=len(reports), best_step=len(reports),
        first_loss=reports[0].loss, last_loss=reports[-1].loss, tokens=reports[-1].tokens, usage=USAGE,
    )  # fmt: skip


@dataclass(frozen=True)
class LoadAnswer:
    ending: ScriptedEnding


Answer = EmbedAnswer | RerankAnswer | GenerateAnswer | TrainAnswer | LoadAnswer
