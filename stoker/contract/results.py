"""What a job ends with."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from stoker.contract.base import Message
from stoker.contract.parts import FunctionCall, Item, Reasoning, items_of
from stoker.contract.reasoning import ReasoningReader
from stoker.contract.stream import FinishReason
from stoker.contract.tool_calls import CallReader, object_of
from stoker.contract.vectors import VectorType


class Usage(Message):
    """Counts, and seconds spent in each phase on the worker."""

    worker: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Of the prompt's tokens, those whose keys and values were there already (prefix cache).
    cached_tokens: int = 0
    #: Of the completions' tokens, those of their reasoning.
    reasoning_tokens: int = 0
    #: From submission until the engine began.
    queued_seconds: float = 0.0
    #: From the engine's start of this job until its end.
    run_seconds: float = 0.0
    #: Generation: until the first token was there.
    first_token_seconds: float = 0.0
    #: Where the request has `lookup`: tokens that were tried as drafts, and those of them that were right. They travel
    #: only there, so that clients of earlier releases read all other results.
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None

    @model_serializer(mode="wrap")
    def _without_drafts(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        made: dict[str, Any] = fields(self)
        return {name: value for name, value in made.items() if value is not None}


class EmbedReply(Message):
    """The vectors are in the blob `blob`: see `stoker.contract.vectors`."""

    blob: str
    rows: int
    dim: int
    dtype: VectorType = "float32"
    usage: Usage


class ToolCall(Message):
    """A call of one of the functions that a request describes in `tools`."""

    name: str
    arguments: dict[str, Any]


class Ranked(Message):
    """One text of those that were reranked, by its index in `texts`."""

    index: int
    score: float


class RerankResult(Message):
    """`scores`: how well each text answers the query, in the order of the texts; the higher, the better."""

    scores: tuple[float, ...]
    usage: Usage

    def ranking(self, top: int | None = None) -> tuple[Ranked, ...]:
        """The best `top` texts (None: all), best first; of texts with one score the first comes first."""
        every = (Ranked(index=index, score=score) for index, score in enumerate(self.scores))
        best = sorted(every, key=lambda ranked: -ranked.score)
        return tuple(best if top is None else best[: max(top, 0)])


class Completion(Message):
    """One answer. `text` is all that the model wrote; `reasoning_content`, `content` and `tool_calls` are what it
    consists of. `token_ids` are all tokens that were made, those of a stop string included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    #: The stop string or token id that ended it, if one did.
    stopped_by: str | int | None = None
    #: Whether the prompt ended in a block of reasoning (`<think>`), with which the text then goes on.
    in_reasoning: bool = False
    #: Names of the functions that the request describes: no other is called.
    functions: tuple[str, ...] = ()

    @property
    def reasoning_content(self) -> str | None:
        """What the model thought before it answered; None: it did not."""
        return next((item.text for item in self._items if isinstance(item, Reasoning)), None)

    @property
    def content(self) -> str:
        """The answer without reasoning and calls."""
        return "".join(item for item in self._items if isinstance(item, str))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of functions that the model wrote, in their order."""
        calls = [item for item in self._items if isinstance(item, FunctionCall)]
        return tuple(ToolCall(name=call.name, arguments=object_of(call.arguments) or {}) for call in calls)

    @property
    def _items(self) -> list[Item]:
        return items_of(ReasoningReader(CallReader(self.functions), in_reasoning=self.in_reasoning), self.text)


class GenerateResult(Completion):
    """The first completion; `others` has the further ones."""

    model: str
    adapter: str | None
    #: The second completion and further ones, when `n` is above 1.
    others: tuple[Completion, ...] = ()
    usage: Usage

    @property
    def completions(self) -> tuple[Completion, ...]:
        """All `n` of them, in order."""
        return (self, *self.others)


class AdapterResult(Message):
    model: str
    adapter: str
    version: int
    rank: int
    #: `lora` or `dora`.
    method: str
    usage: Usage


class TrainResult(Message):
    model: str
    #: The adapter's name and version; `name@version` pins this one.
    adapter: str
    version: int
    steps: int
    first_loss: float
    last_loss: float
    #: The step whose weights the adapter has: the one of the least held-out loss, else the last.
    best_step: int
    held_out_loss: float | None = None
    #: How often the run diverged and was rolled back.
    rollbacks: int = 0
    #: Tokens that went through the model.
    tokens: int
    usage: Usage
