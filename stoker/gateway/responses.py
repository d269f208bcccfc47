"""`/v1/responses`: OpenAI's newer form of a conversation, of texts and function calls, without stored state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stoker.client.options import GenerateOptions
from stoker.contract import GenerateResult, StreamToken
from stoker.contract.requests import MAX_ENTRIES
from stoker.gateway.answers import Generation
from stoker.gateway.calls import Call
from stoker.gateway.errors import Names, Refused
from stoker.gateway.events import Event
from stoker.gateway.fields import Body, parse
from stoker.gateway.response_items import FunctionTool, Item, TextFormat, choice_of, items_of
from stoker.gateway.sampling import TIERS, GenerateBody
from stoker.gateway.tools import Forced, Tool, forced

NAMES = Names({"max_tokens": "max_output_tokens", "json_schema": "text", "adapter": "model", "messages": "input"})
_STORED = "nothing is stored here; send the whole conversation as input"


class TextOptions(Body):
    format: TextFormat = Field(default_factory=lambda: TextFormat(type="text"))


class ResponsesBody(GenerateBody):
    REFUSED: ClassVar[Mapping[str, str]] = {
        "access_programs": "leave it out",
        "background": "send it with x-stoker-on-disconnect: continue and an Idempotency-Key",
        "background_options": "leave it out",
        "context_management": "leave it out",
        "conversation": _STORED,
        "image": "models here write texts alone; leave it out",
        "include": "leave it out",
        "max_tool_calls": "an answer calls one function; leave it out",
        "metadata": "nothing is stored that it could be found by; leave it out",
        "moderation": "leave it out",
        "parallel_tool_calls": "an answer calls one function; leave it out",
        "previous_response_id": _STORED,
        "prompt": _STORED,
        "prompt_cache_key": "prefixes are kept by their tokens; leave it out",
        "prompt_cache_options": "prefixes are kept by their tokens; leave it out",
        "prompt_cache_retention": "prefixes are kept by their tokens; leave it out",
        "reasoning": "leave it out",
        "safety_identifier": "name the sender with user",
        "stream_options": "counts always come with the last event; leave it out",
        "top_logprobs": "ask /v1/chat/completions for them",
    }

    input: Annotated[list[Item], BeforeValidator(items_of)] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    tools: list[FunctionTool] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    truncation: Literal["disabled"] = "disabled"
    store: Literal[False] = False
    service_tier: Literal["auto", "default", "priority", "flex"] = "auto"
    user: str | None = None

    @property
    def usual_priority(self) -> int:
        return TIERS[self.service_tier]

    def forced(self) -> Forced | None:
        tools = [Tool(type="function", function=tool.function) for tool in self.tools]
        return forced(tools, choice_of(self.tool_choice))

    def options(self, most_tokens: int) -> GenerateOptions:
        options = self.sampling()
        limit = min(most_tokens, MAX_ENTRIES)
        options["max_tokens"] = limit if self.max_output_tokens is None else self.max_output_tokens
        call, asked = self.forced(), self.text.format.schema_of_answer()
        if call is not None and (asked is not None or self.regex is not None):
            message = "tool_choice: a call is asked for together with text.format or regex; say one of them."
            raise Refused(400, message, param="tool_choice", code="invalid_value")
        schema = asked if call is None else call.schema
        if schema is not None:
            options["json_schema"] = schema
        if self.tools:
            options["tools"] = [tool.function.as_template() for tool in self.tools]
        return options

    def conversation(self) -> list[dict[str, object]]:
        first: list[dict[str, object]] = []
        if self.instructions is not None:
            first = [{"role": "system", "content": self.instructions}]
        return first + [item.as_template() for item in self.input]


async def asked(call: Call) -> Generation:
    """Raises `Refused`."""
    body = parse(ResponsesBody, call.body)
    model, adapter = call.model(body.model)
    form = ResponsesForm(call.named.id, body.model, body.forced(), body.tools)
    options, prompt = body.options(await call.models.most_tokens(model)), body.conversation()
    return Generation(call.sender(body.user), model, adapter, prompt, options, body.seed, form, NAMES, body.stream)


@dataclass
class ResponsesForm:
    job_id: str
    model: str
    forced: Forced | None
    tools: list[FunctionTool]
    wants_tokens: bool = False
    _text: str = ""
    _number: int = 0
    _opened: bool = False
    _created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, result: GenerateResult, tokens: Sequence[StreamToken]) -> dict[str, object]:
        ended = result.finish_reason in ("length", "context")
        usage = result.usage
        counts = {
            "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }  # fmt: skip
        return self._response(
            "incomplete" if ended else "completed",
            output=[self._item(result.text, "incomplete" if ended else "completed")],
            incomplete_details={"reason": "max_output_tokens"} if ended else None, usage=counts,
        )  # fmt: skip

    def _response(self, status: str, **fields: object) -> dict[str, object]:
        return {
            "id": f"resp_{self.job_id}", "object": "response", "created_at": self._created, "status": status,
            "model": self.model, "output": [], "error": None, "incomplete_details": None, "instructions": None,
            "metadata": {}, "parallel_tool_calls": False, "store": False, "temperature": None, "top_p": None,
            "tool_choice": "auto" if self.forced is None else "required",
            "tools": [tool.model_dump() for tool in self.tools], **fields,
        }  # fmt: skip

    def _item(self, text: str, status: str) -> dict[str, object]:
        made = None if self.forced is None else self.forced.call(text)
        if made is not None:
            return self._call(made[0], made[1], status)
        content = [{"type": "output_text", "text": text, "annotations": []}]
        return {
            "type": "message",
            "id": f"msg_{self.job_id}",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _call(self, name: str, arguments: str, status: str) -> dict[str, object]:
        return {
            "type": "function_call", "id": f"fc_{self.job_id}", "call_id": f"call_{self.job_id}", "name": name,
            "arguments": arguments, "status": status,
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
        self._text += token.text
        if self.forced is None:
            yield from self._message()
            if token.text:
                yield self._event("output_text.delta", **self._part, delta=token.text, logprobs=[])
        elif self.forced.name is not None:
            yield from self._open(self._call(self.forced.name, "", "in_progress"))
            if token.text:
                yield self._event("function_call_arguments.delta", **self._place("fc"), delta=token.text)
        elif token.is_last:
            made = self.forced.call(self._text)
            yield from self._message() if made is None else self._open(self._call(made[0], "", "in_progress"))
            if made is None:
                yield self._event("output_text.delta", **self._part, delta=self._text, logprobs=[])
            else:
                yield self._event("function_call_arguments.delta", **self._place("fc"), delta=made[1])

    def _place(self, kind: str) -> dict[str, object]:
        return {"item_id": f"{kind}_{self.job_id}", "output_index": 0}

    @property
    def _part(self) -> dict[str, object]:
        return {**self._place("msg"), "content_index": 0}

    def _open(self, item: dict[str, object]) -> Iterator[Event]:
        if not self._opened:
            self._opened = True
            yield self._event("output_item.added", output_index=0, item=item)

    def _message(self) -> Iterator[Event]:
        if not self._opened:
            yield from self._open({**self._item("", "in_progress"), "content": []})
            part = {"type": "output_text", "text": "", "annotations": []}
            yield self._event("content_part.added", **self._part, part=part)

    def last(self, result: GenerateResult) -> Iterator[Event]:
        response = self.whole(result, ())
        item = self._item(result.text, str(response["status"]))
        if item["type"] == "message":
            part = {"type": "output_text", "text": result.text, "annotations": []}
            yield self._event("output_text.done", **self._part, text=result.text, logprobs=[])
            yield self._event("content_part.done", **self._part, part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("function_call_arguments.done", **self._place("fc"), **done)
        yield self._event("output_item.done", output_index=0, item=item)
        yield self._event(str(response["status"]), response=response)

    def failed(self, refused: Refused) -> Iterator[Event]:
        said = {"code": refused.code, "message": refused.message, "param": refused.param}
        self._number += 1
        yield Event({"type": "error", "sequence_number": self._number - 1, **said}, name="error")
