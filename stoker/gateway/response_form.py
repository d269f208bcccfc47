"""An answer in the form of `/v1/responses`, whole or as events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from stoker.contract import GenerateResult, StreamToken
from stoker.contract.parts import Begun, FunctionCall, Item, Part, Reasoning, add, items_of
from stoker.contract.reasoning import ReasoningReader, parts_of
from stoker.gateway.errors import Refused
from stoker.gateway.events import Event
from stoker.gateway.response_items import FunctionTool
from stoker.gateway.tools import Choice, call_id


@dataclass(frozen=True)
class Asked:
    """What a response repeats of its request. None: not given."""

    temperature: float | None = None
    top_p: float | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None


@dataclass
class ResponsesForm:
    job_id: str
    model: str
    choice: Choice
    tools: list[FunctionTool]
    asked: Asked = Asked()
    wants_tokens: bool = False
    _number: int = 0
    _reader: ReasoningReader = field(init=False)
    #: What a stream has said so far; the last one is open.
    _items: list[Item] = field(default_factory=list)
    _created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._reader = self.choice.reader()

    def whole(self, result: GenerateResult, tokens: Sequence[StreamToken]) -> dict[str, object]:
        ended = result.finish_reason in ("length", "context")
        usage = result.usage
        counts = {
            "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }  # fmt: skip
        status = "incomplete" if ended else "completed"
        items = items_of(self.choice.reader(in_reasoning=result.in_reasoning), result.text) or [""]
        return self._response(
            status, output=self._output(items, status),
            incomplete_details={"reason": "max_output_tokens"} if ended else None, usage=counts,
        )  # fmt: skip

    def _response(self, status: str, **fields: object) -> dict[str, object]:
        return {
            "id": f"resp_{self.job_id}", "object": "response", "created_at": self._created, "status": status,
            "model": self.model, "output": [], "error": None, "incomplete_details": None, "metadata": {},
            "parallel_tool_calls": self.choice.parallel, "store": False, "tool_choice": self._tool_choice(),
            "tools": [tool.model_dump() for tool in self.tools], **asdict(self.asked), **fields,
        }  # fmt: skip

    def _tool_choice(self) -> object:
        if self.choice.name is not None:
            return {"type": "function", "name": self.choice.name}
        return self.choice.mode if self.tools else "auto"

    def _output(self, items: list[Item], status: str) -> list[dict[str, object]]:
        """`status`: that of the last one."""
        last = len(items) - 1
        return [self._item(at, item, status if at == last else "completed") for at, item in enumerate(items)]

    def _item(self, at: int, item: Item, status: str) -> dict[str, object]:
        if isinstance(item, FunctionCall):
            return {
                "type": "function_call", "id": f"fc_{self.job_id}_{at}", "call_id": call_id(self.job_id, 0, at),
                "name": item.name, "arguments": item.arguments, "status": status,
            }  # fmt: skip
        if isinstance(item, Reasoning):
            return {
                "type": "reasoning", "id": f"rs_{self.job_id}_{at}", "summary": [], "status": status,
                "content": [_content_part(item)],
            }  # fmt: skip
        return {
            "type": "message", "id": f"msg_{self.job_id}_{at}", "role": "assistant", "status": status,
            "content": [_content_part(item)],
        }  # fmt: skip

    def _event(self, kind: str, **fields: object) -> Event:
        self._number += 1
        return Event(
            {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}, name=f"response.{kind}"
        )

    def first(self) -> Iterator[Event]:
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self._response("in_progress"))

    def token(self, token: StreamToken) -> Iterator[Event]:
        # The events of `first` are counted also where they are not sent.
        self._number = max(self._number, 2)
        for part in parts_of(self._reader, token):
            yield from self._part(part)
        if token.is_last and not self._items:
            yield from self._begin("")

    def _part(self, part: Part) -> Iterator[Event]:
        if isinstance(part, Begun):
            yield from self._begin(FunctionCall(part.name, ""))
            return
        if isinstance(part, str | Reasoning) and not (self._items and type(self._items[-1]) is type(part)):
            yield from self._begin("" if isinstance(part, str) else Reasoning(""))
        add(self._items, part)
        if isinstance(part, str):
            yield self._event("output_text.delta", **self._content, delta=part, logprobs=[])
        elif isinstance(part, Reasoning):
            yield self._event("reasoning_text.delta", **self._content, delta=part.text)
        else:
            yield self._event("function_call_arguments.delta", **self._place, delta=part.text)

    @property
    def _place(self) -> dict[str, object]:
        """Of the open item."""
        at = len(self._items) - 1
        return {"item_id": self._item(at, self._items[at], "")["id"], "output_index": at}

    @property
    def _content(self) -> dict[str, object]:
        return {**self._place, "content_index": 0}

    def _begin(self, item: Item) -> Iterator[Event]:
        yield from self._end("completed")
        self._items.append(item)
        at = len(self._items) - 1
        begun = self._item(at, item, "in_progress") | ({} if isinstance(item, FunctionCall) else {"content": []})
        yield self._event("output_item.added", output_index=at, item=begun)
        if not isinstance(item, FunctionCall):
            yield self._event("content_part.added", **self._content, part=_content_part(item))

    def _end(self, status: str) -> Iterator[Event]:
        if not self._items:
            return
        at, item = len(self._items) - 1, self._items[-1]
        if isinstance(item, FunctionCall):
            done = {"name": item.name, "arguments": item.arguments}
            yield self._event("function_call_arguments.done", **self._place, **done)
        else:
            if isinstance(item, str):
                yield self._event("output_text.done", **self._content, text=item, logprobs=[])
            else:
                yield self._event("reasoning_text.done", **self._content, text=item.text)
            yield self._event("content_part.done", **self._content, part=_content_part(item))
        yield self._event("output_item.done", output_index=at, item=self._item(at, item, status))

    def last(self, result: GenerateResult) -> Iterator[Event]:
        response = self.whole(result, ())
        status = str(response["status"])
        yield from self._end(status)
        yield self._event(status, response=response)

    def failed(self, refused: Refused) -> Iterator[Event]:
        said = {"code": refused.code, "message": refused.message, "param": refused.param}
        self._number += 1
        yield Event({"type": "error", "sequence_number": self._number - 1, **said}, name="error")


def _content_part(item: str | Reasoning) -> dict[str, object]:
    if isinstance(item, Reasoning):
        return {"type": "reasoning_text", "text": item.text}
    return {"type": "output_text", "text": item, "annotations": []}
