"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from stoker.client.options import GenerateOptions
from stoker.contract import Completion, FinishReason, GenerateResult, StreamToken
from stoker.contract.parts import Begun, FunctionCall, Part, Reasoning, items_of
from stoker.contract.reasoning import ReasoningReader, parts_of
from stoker.contract.requests import MAX_ENTRIES
from stoker.gateway.answers import Generation
from stoker.gateway.calls import Call, parsed
from stoker.gateway.errors import Names, Refused
from stoker.gateway.events import Event
from stoker.gateway.fields import Body, Items, check_schema
from stoker.gateway.logprobs import all_logprobs, logprobs_of
from stoker.gateway.messages import ChatMessageBody
from stoker.gateway.sampling import OpenAIBody
from stoker.gateway.tools import Choice, Tool, call_id, chosen, tool_options
from stoker.gateway.usage import finish_reason, usage_of

NAMES = Names({"json_schema": "response_format", "adapter": "model", "template": "chat_template_kwargs"})


class JsonSchema(Body):
    name: str
    description: str | None = None
    # `schema` is a method of pydantic's.
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    #: Answers always fit the schema.
    strict: bool = True


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_answer(self) -> dict[str, Any] | None:
        check_schema("response_format.json_schema", self.type, given=self.json_schema is not None)
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatBody(OpenAIBody):
    REFUSED: ClassVar[Mapping[str, str]] = {
        "audio": "models here write texts alone; leave it out",
        "function_call": "say it with tool_choice",
        "functions": "say it with tools",
        "metadata": "nothing is stored that it could be found by; leave it out",
        "modalities": "models here write texts alone; leave it out",
        "moderation": "leave it out",
        "prediction": "leave it out",
        "prompt_cache_key": "prefixes are kept by their tokens; leave it out",
        "prompt_cache_options": "prefixes are kept by their tokens; leave it out",
        "prompt_cache_retention": "prefixes are kept by their tokens; leave it out",
        "reasoning_effort": "say it to the model's template with chat_template_kwargs, such as enable_thinking",
        "safety_identifier": "name the sender with user",
        "verbosity": "say it in a message",
        "web_search_options": "models here have no network; leave it out",
    }
    IDLE: ClassVar[Mapping[str, object]] = {"functions": [], "metadata": {}, "modalities": ["text"]}
    USUAL: ClassVar[Mapping[str, object]] = {
        "tool_choice": "auto",
        "response_format": ResponseFormat(type="text").model_dump(),
    }

    messages: Items[ChatMessageBody] = Field(min_length=1)
    max_completion_tokens: int | None = None
    #: The older name of the same.
    max_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Items[Tool] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    store: bool = False
    #: Further variables of the chat template, such as `enable_thinking`.
    chat_template_kwargs: dict[str, Any] | None = None

    def work(self) -> dict[str, Any]:
        fields = super().work()
        if self.max_tokens is not None:
            fields["max_completion_tokens"] = fields.pop("max_tokens")
        return fields

    def options(self, most_tokens: int) -> GenerateOptions:
        options = self.sampling()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens: given with max_completion_tokens; say one of them."
            raise Refused(400, message, param="max_tokens", code="invalid_value")
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs: given without logprobs; set logprobs to true."
            raise Refused(400, message, param="top_logprobs", code="invalid_value")
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        # All entries of a job together have a limit: who names none gets what is left under it.
        room = MAX_ENTRIES // (max(1, self.n) * (1 + self.top_logprobs))
        options["max_tokens"] = min(most_tokens, max(1, room)) if asked is None else asked
        options["top_logprobs"] = self.top_logprobs
        if self.chat_template_kwargs:
            options["template"] = self.chat_template_kwargs
        asked_for = None if self.response_format is None else self.response_format.schema_of_answer()
        schema = self.choice().schema_of_answer(asked_for, self.regex, "response_format or regex")
        return options | tool_options([tool.function for tool in self.tools], schema)

    def choice(self) -> Choice:
        functions = [tool.function for tool in self.tools]
        return chosen(functions, self.tool_choice, parallel=self.parallel_tool_calls)


async def asked(call: Call) -> Generation:
    """Raises `Refused`."""
    call, body = parsed(call, ChatBody)
    model, adapter = call.model(body.model)
    form = ChatForm(
        call.named.id, body.model, body.choice(), body.logprobs, body.include_usage, body.service_tier,
    )  # fmt: skip
    messages = [message.as_template() for message in body.messages]
    options = body.options(await call.models.most_tokens(model))
    names = Names(
        {**NAMES.by_field, "max_tokens": "max_tokens" if body.max_tokens is not None else "max_completion_tokens"}
    )
    return Generation(
        call.sender(body.user), model, adapter, messages, options, body.seed, form, names, body.stream, body.store
    )


@dataclass
class ChatForm:
    job_id: str
    model: str
    tool_choice: Choice
    wants_tokens: bool
    include_usage: bool
    tier: str
    #: Of each completion that is streamed: what reads it, and how many calls have begun.
    _readers: dict[int, ReasoningReader] = field(default_factory=dict)
    _calls: Counter[int] = field(default_factory=Counter)
    _created: int = field(default_factory=lambda: int(time.time()))

    def _object(self, kind: str, choices: Sequence[dict[str, object]]) -> dict[str, object]:
        return {
            "id": f"chatcmpl-{self.job_id}", "object": kind, "created": self._created, "model": self.model,
            "choices": choices, "service_tier": self.tier,
        }  # fmt: skip

    def whole(self, result: GenerateResult, tokens: Sequence[StreamToken]) -> dict[str, object]:
        choices = []
        for index, completion in enumerate(result.completions):
            own = [token for token in tokens if token.completion == index]
            said = all_logprobs(own) if self.wants_tokens else None
            choices.append(self._choice(index, completion, said))
        return self._object("chat.completion", choices) | {"usage": usage_of(result)}

    def _choice(self, index: int, completion: Completion, said: dict[str, object] | None) -> dict[str, object]:
        items = items_of(self.tool_choice.reader(in_reasoning=completion.in_reasoning), completion.text)
        text = "".join(item for item in items if isinstance(item, str))
        calls = [item for item in items if isinstance(item, FunctionCall)]
        message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
        for thought in (item for item in items if isinstance(item, Reasoning)):
            message["reasoning_content"] = thought.text
        if calls:
            made = [self._tool_call(index, number, one.name, one.arguments) for number, one in enumerate(calls)]
            message |= {"content": text or None, "tool_calls": made}
        reason = _ending(completion.finish_reason, called=bool(calls))
        return {"index": index, "message": message, "logprobs": said, "finish_reason": reason}

    def _tool_call(self, index: int, number: int, name: str, arguments: str) -> dict[str, object]:
        function = {"name": name, "arguments": arguments}
        return {"id": call_id(self.job_id, index, number), "type": "function", "function": function}

    def _chunk(
        self, index: int, delta: dict[str, object], reason: str | None = None, said: dict[str, object] | None = None
    ) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": said, "finish_reason": reason}
        usage: dict[str, object] = {"usage": None} if self.include_usage else {}
        return Event(self._object("chat.completion.chunk", [choice]) | usage)

    def first(self) -> Iterator[Event]:
        return iter(())

    def token(self, token: StreamToken) -> Iterator[Event]:
        index = token.completion
        if index not in self._readers:
            self._readers[index] = self.tool_choice.reader()
            # Whether an answer that may be a call has a text is known later.
            content = "" if self.tool_choice.mode == "none" else None
            yield self._chunk(index, {"role": "assistant", "content": content, "refusal": None})
        said = logprobs_of([token]) if self.wants_tokens else None
        deltas = [self._delta(index, part) for part in parts_of(self._readers[index], token)]
        for delta in deltas or ([{}] if said else []):
            yield self._chunk(index, delta, said=said)
            said = None
        if token.finish_reason is not None:
            yield self._chunk(index, {}, _ending(token.finish_reason, called=self._calls[index] > 0))

    def _delta(self, index: int, part: Part) -> dict[str, object]:
        if isinstance(part, str):
            return {"content": part}
        if isinstance(part, Reasoning):
            return {"reasoning_content": part.text}
        if isinstance(part, Begun):
            self._calls[index] += 1
            number = self._calls[index] - 1
            return {"tool_calls": [{"index": number, **self._tool_call(index, number, part.name, "")}]}
        return {"tool_calls": [{"index": self._calls[index] - 1, "function": {"arguments": part.text}}]}

    def last(self, result: GenerateResult) -> Iterator[Event]:
        if self.include_usage:
            yield Event(self._object("chat.completion.chunk", []) | {"usage": usage_of(result)})
        yield Event("[DONE]")

    def failed(self, refused: Refused) -> Iterator[Event]:
        yield Event(refused.openai())


def _ending(reason: FinishReason, *, called: bool) -> str:
    said = finish_reason(reason)
    return "tool_calls" if called and said == "stop" else said
