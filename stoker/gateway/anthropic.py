"""`/v1/messages`, as Anthropic's clients ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from stoker.client.options import GenerateOptions
from stoker.contract import GenerateResult, StreamToken
from stoker.contract.parts import Arguments, Begun, FunctionCall, Item, Part, Reasoning, items_of
from stoker.contract.reasoning import ReasoningReader, parts_of
from stoker.contract.tool_calls import object_of
from stoker.gateway.answers import Generation
from stoker.gateway.anthropic_messages import AnthropicMessage, AnthropicTool, Blocks, ToolChoice, choice_of, text_of
from stoker.gateway.calls import Call, parsed
from stoker.gateway.errors import Names, Refused
from stoker.gateway.events import Event
from stoker.gateway.fields import Body, Items
from stoker.gateway.sampling import GenerateBody, Texts
from stoker.gateway.tools import Choice, call_id, tool_options

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
        "thinking": "a model thinks as its chat template has it; leave it out",
        "user_profile_id": "name the sender with metadata.user_id",
        "workspace_id": "leave it out",
    }
    USUAL: ClassVar[Mapping[str, object]] = {"tool_choice": ToolChoice(type="auto").model_dump()}

    max_tokens: int
    messages: Items[AnthropicMessage] = Field(min_length=1)
    system: Blocks = Field(default_factory=list)
    stop_sequences: Texts = Field(default_factory=list)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] = "auto"
    tools: Items[AnthropicTool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None

    def options(self) -> GenerateOptions:
        options = self.sampling() | GenerateOptions(max_tokens=self.max_tokens, stop=self.stop_sequences)
        schema = choice_of(self.tools, self.tool_choice).schema_of_answer(None, self.regex, "regex")
        return options | tool_options([tool.function for tool in self.tools], schema)

    def conversation(self) -> list[dict[str, object]]:
        if self.messages[-1].role == "assistant":
            message = "messages: the last one is the assistant's, and answers are begun anew; end with the user's."
            raise Refused(400, message, param="messages", code="unsupported_parameter")
        first: list[dict[str, object]] = [{"role": "system", "content": text_of(self.system)}] if self.system else []
        return first + [message for said in self.messages for message in said.as_template()]


async def asked(call: Call) -> Generation:
    """Raises `Refused`."""
    call, body = parsed(call, MessagesBody)
    model, adapter = call.model(body.model)
    form = MessagesForm(call.named.id, body.model, choice_of(body.tools, body.tool_choice))
    user = None if body.metadata is None else body.metadata.user_id
    options, prompt = body.options(), body.conversation()
    client = call.sender(user, "metadata.user_id")
    return Generation(client, model, adapter, prompt, options, body.seed, form, NAMES, body.stream)


@dataclass
class MessagesForm:
    job_id: str
    model: str
    choice: Choice
    wants_tokens: bool = False
    _reader: ReasoningReader = field(init=False)
    #: Types of the blocks of a stream; the last one is open.
    _blocks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = self.choice.reader()

    def whole(self, result: GenerateResult, tokens: Sequence[StreamToken]) -> dict[str, object]:
        items = items_of(self.choice.reader(in_reasoning=result.in_reasoning), result.text) or [""]
        blocks = [self._block(number, item) for number, item in enumerate(items)]
        called = any(block["type"] == "tool_use" for block in blocks)
        return self._message(blocks) | self._ending(result, called=called) | {"usage": _usage(result)}

    def _block(self, number: int, item: Item) -> dict[str, object]:
        if isinstance(item, Reasoning):
            return _thinking(item.text)
        if isinstance(item, FunctionCall):
            given = object_of(item.arguments)
            if given is not None:
                return self._tool_use(number, item.name, given)
            item = item.arguments
        return {"type": "text", "text": item}

    def _message(self, content: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": f"msg_{self.job_id}", "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip

    def _tool_use(self, number: int, name: str, given: dict[str, Any]) -> dict[str, object]:
        return {"type": "tool_use", "id": call_id(self.job_id, 0, number), "name": name, "input": given}

    def _ending(self, result: GenerateResult, *, called: bool) -> dict[str, object]:
        reason = _REASONS.get(result.finish_reason, "end_turn")
        by = result.stopped_by if result.finish_reason == "stop_string" else None
        return {"stop_reason": "tool_use" if called and reason == "end_turn" else reason, "stop_sequence": by}

    def first(self) -> Iterator[Event]:
        yield _event("message_start", message=self._message([]))

    def token(self, token: StreamToken) -> Iterator[Event]:
        for part in parts_of(self._reader, token):
            yield from self._part(part)
        if token.is_last and not self._blocks:
            yield from self._part("")

    def _part(self, part: Part) -> Iterator[Event]:
        if isinstance(part, Begun):
            yield from self._open(self._tool_use(len(self._blocks), part.name, {}))
        elif isinstance(part, Arguments):
            yield self._delta({"type": "input_json_delta", "partial_json": part.text})
        elif isinstance(part, Reasoning):
            if not self._blocks:
                yield from self._open(_thinking(""))
            yield self._delta({"type": "thinking_delta", "thinking": part.text})
        else:
            if self._blocks[-1:] != ["text"]:
                yield from self._open({"type": "text", "text": ""})
            if part:
                yield self._delta({"type": "text_delta", "text": part})

    def _open(self, block: dict[str, object]) -> Iterator[Event]:
        yield from self._close()
        self._blocks.append(str(block["type"]))
        yield _event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _close(self) -> Iterator[Event]:
        if self._blocks:
            yield _event("content_block_stop", index=len(self._blocks) - 1)

    def _delta(self, delta: dict[str, object]) -> Event:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def last(self, result: GenerateResult) -> Iterator[Event]:
        yield from self._close()
        ending = self._ending(result, called="tool_use" in self._blocks)
        yield _event("message_delta", delta=ending, usage=_usage(result))
        yield _event("message_stop")

    def failed(self, refused: Refused) -> Iterator[Event]:
        yield Event(refused.anthropic(self.job_id), name="error")


def _thinking(text: str) -> dict[str, object]:
    """It is not signed: any that comes back is taken."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def _event(kind: str, **fields: object) -> Event:
    return Event({"type": kind, **fields}, name=kind)


def _usage(result: GenerateResult) -> dict[str, object]:
    """Tokens of the prompt that were kept are counted by themselves, as Anthropic does."""
    usage = result.usage
    fresh = usage.prompt_tokens - usage.cached_tokens
    return {
        "input_tokens": fresh, "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens,
    }  # fmt: skip
