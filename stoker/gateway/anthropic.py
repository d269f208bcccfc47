"""`/v1/messages`, as Anthropic's clients ask for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from stoker.client.options import GenerateOptions
from stoker.contract import GenerateResult, StreamToken
from stoker.gateway.answers import Generation
from stoker.gateway.anthropic_messages import AnthropicMessage, AnthropicTool, Blocks, ToolChoice, forced, text_of
from stoker.gateway.calls import Call
from stoker.gateway.errors import Names, Refused
from stoker.gateway.events import Event
from stoker.gateway.fields import Body, parse
from stoker.gateway.sampling import GenerateBody, Texts
from stoker.gateway.tools import Forced

NAMES = Names({"stop": "stop_sequences", "json_schema": "tools", "adapter": "model"})
_REASONS = {"length": "max_tokens", "context": "model_context_window_exceeded", "stop_string": "stop_sequence"}


class Metadata(Body):
    user_id: str | None = None


class MessagesBody(GenerateBody):
    REFUSED: ClassVar[Mapping[str, str]] = {
        "cache_control": "prefixes are kept by their tokens; leave it out",
        "container": "leave it out",
        "context_management": "leave it out",
        "diagnostics": "leave it out",
        "inference_geo": "leave it out",
        "mcp_servers": "models here have no network; leave it out",
        "output_config": "leave it out",
        "speed": "leave it out",
        "thinking": "leave it out",
        "user_profile_id": "name the sender with metadata.user_id",
        "workspace_id": "leave it out",
    }

    max_tokens: int
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: Blocks = Field(default_factory=list)
    stop_sequences: Texts = Field(default_factory=list)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] = "auto"
    tools: list[AnthropicTool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None

    def options(self) -> GenerateOptions:
        options = self.sampling() | GenerateOptions(max_tokens=self.max_tokens, stop=self.stop_sequences)
        call = forced(self.tools, self.tool_choice)
        if call is not None and self.regex is not None:
            raise Refused(400, "tool_choice: given with regex; say one of them.", param="tool_choice")
        if call is not None:
            options["json_schema"] = call.schema
        if self.tools:
            options["tools"] = [tool.function.as_template() for tool in self.tools]
        return options

    def conversation(self) -> list[dict[str, object]]:
        if self.messages[-1].role == "assistant":
            message = "messages: the last one is the assistant's, and answers are begun anew; end with the user's."
            raise Refused(400, message, param="messages", code="unsupported_parameter")
        first: list[dict[str, object]] = [{"role": "system", "content": text_of(self.system)}] if self.system else []
        return first + [message for said in self.messages for message in said.as_template()]


async def asked(call: Call) -> Generation:
    """Raises `Refused`."""
    body = parse(MessagesBody, call.body)
    model, adapter = call.model(body.model)
    form = MessagesForm(call.named.id, body.model, forced(body.tools, body.tool_choice))
    user = None if body.metadata is None else body.metadata.user_id
    options, prompt = body.options(), body.conversation()
    return Generation(call.sender(user), model, adapter, prompt, options, body.seed, form, NAMES, body.stream)


@dataclass
class MessagesForm:
    job_id: str
    model: str
    forced: Forced | None
    wants_tokens: bool = False
    _text: str = ""
    _opened: bool = False

    def whole(self, result: GenerateResult, tokens: Sequence[StreamToken]) -> dict[str, object]:
        made = None if self.forced is None else self.forced.call(result.text)
        given = None if made is None else _object(made[1])
        block: dict[str, object] = {"type": "text", "text": result.text}
        if made is not None and given is not None:
            block = self._tool_use(made[0], given)
        return self._message([block]) | self._ending(result, called=given is not None) | {"usage": _usage(result)}

    def _message(self, content: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": f"msg_{self.job_id}", "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip

    def _tool_use(self, name: str, given: dict[str, Any]) -> dict[str, object]:
        return {"type": "tool_use", "id": f"toolu_{self.job_id}", "name": name, "input": given}

    def _ending(self, result: GenerateResult, *, called: bool) -> dict[str, object]:
        reason = _REASONS.get(result.finish_reason, "end_turn")
        by = result.stopped_by if result.finish_reason == "stop_string" else None
        return {"stop_reason": "tool_use" if called and reason == "end_turn" else reason, "stop_sequence": by}

    def first(self) -> Iterator[Event]:
        yield _event("message_start", message=self._message([]))

    def token(self, token: StreamToken) -> Iterator[Event]:
        self._text += token.text
        if self.forced is None:
            yield from self._open({"type": "text", "text": ""})
            if token.text:
                yield _delta({"type": "text_delta", "text": token.text})
        elif self.forced.name is not None:
            yield from self._open(self._tool_use(self.forced.name, {}))
            if token.text:
                yield _delta({"type": "input_json_delta", "partial_json": token.text})
        elif token.is_last:
            yield from self._any_call(self.forced)

    def _open(self, block: dict[str, object]) -> Iterator[Event]:
        if not self._opened:
            self._opened = True
            yield _event("content_block_start", index=0, content_block=block)

    def _any_call(self, forced: Forced) -> Iterator[Event]:
        """Of a call of any tool the whole is known at its end alone; one that was cut off is a text."""
        made = forced.call(self._text)
        if made is None:
            yield from self._open({"type": "text", "text": ""})
            yield _delta({"type": "text_delta", "text": self._text})
        else:
            yield from self._open(self._tool_use(made[0], {}))
            yield _delta({"type": "input_json_delta", "partial_json": made[1]})

    def last(self, result: GenerateResult) -> Iterator[Event]:
        made = None if self.forced is None else self.forced.call(result.text)
        yield _event("content_block_stop", index=0)
        ending = self._ending(result, called=made is not None)
        yield _event("message_delta", delta=ending, usage=_usage(result))
        yield _event("message_stop")

    def failed(self, refused: Refused) -> Iterator[Event]:
        yield Event(refused.anthropic(self.job_id), name="error")


def _object(text: str) -> dict[str, Any] | None:
    """The arguments of a call; None for those that were cut off."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _event(kind: str, **fields: object) -> Event:
    return Event({"type": kind, **fields}, name=kind)


def _delta(delta: dict[str, object]) -> Event:
    return _event("content_block_delta", index=0, delta=delta)


def _usage(result: GenerateResult) -> dict[str, object]:
    """Tokens of the prompt that were kept are counted by themselves, as Anthropic does."""
    usage = result.usage
    fresh = usage.prompt_tokens - usage.cached_tokens
    return {
        "input_tokens": fresh, "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens,
    }  # fmt: skip
