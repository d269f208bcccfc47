"""Conversations and tools as Anthropic's clients send them, as messages for a model's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stoker.gateway.fields import Body, Items
from stoker.gateway.tools import Choice, Function, by_name, chosen


def _blocks(value: Any) -> Any:
    """A text is one block."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


#: Type of a block → the fields that it must have, and may have.
FIELDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "text": (frozenset({"text"}), frozenset()),
    "thinking": (frozenset({"thinking"}), frozenset({"signature"})),
    "tool_use": (frozenset({"id", "name", "input"}), frozenset()),
    "tool_result": (frozenset({"tool_use_id"}), frozenset({"content", "is_error"})),
}


class Block(Body):
    """A part of a message; which fields it has depends on its `type`."""

    type: Literal["text", "thinking", "tool_use", "tool_result"]
    text: str = ""
    thinking: str = ""
    signature: str = ""
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] = Field(default_factory=dict)
    tool_use_id: str | None = None
    content: Annotated[Items[Block], BeforeValidator(_blocks)] = Field(default_factory=list)
    #: Templates have no word for it: the text says it.
    is_error: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Block:
        needed, further = FIELDS[self.type]
        given = self.model_fields_set - {"type"}
        for name in sorted(needed - given):
            raise ValueError(f"{name} is missing, which a block of type {self.type} has")
        for name in sorted(given - needed - further):
            raise ValueError(f"{name} given; a block of type {self.type} has {', '.join(sorted(needed | further))}")
        return self


Blocks = Annotated[Items[Block], BeforeValidator(_blocks)]


class AnthropicMessage(Body):
    role: Literal["user", "assistant"]
    content: Blocks

    def as_template(self) -> list[dict[str, object]]:
        """The messages that it is for a template: results of tools are messages of their own, before what is said."""
        results = [block for block in self.content if block.type == "tool_result"]
        messages = [_result(block) for block in results]
        said: dict[str, object] = {"role": self.role, "content": text_of(self.content)}
        thought = "".join(block.thinking for block in self.content)
        if thought:
            said["reasoning_content"] = thought
        calls = [_call(block) for block in self.content if block.type == "tool_use"]
        if calls:
            said["tool_calls"] = calls
        return [*messages, *([] if results and not said["content"] and not calls else [said])]


def text_of(blocks: list[Block]) -> str:
    return "".join(block.text for block in blocks)


def _result(block: Block) -> dict[str, object]:
    said = ("Error: " if block.is_error else "") + text_of(block.content)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": said}


def _call(block: Block) -> dict[str, object]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


class AnthropicTool(Body):
    #: The first, because one of another type lacks what follows.
    type: Literal["custom"] = "custom"
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    input_schema: dict[str, Any]
    description: str = ""

    @property
    def function(self) -> Function:
        return Function(name=self.name, description=self.description, parameters=self.input_schema)


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


def choice_of(tools: list[AnthropicTool], choice: ToolChoice | None) -> Choice:
    """Raises `Refused`."""
    kind = "auto" if choice is None else choice.type
    parallel = choice is None or not choice.disable_parallel_tool_use
    functions = tuple(tool.function for tool in tools)
    if functions and choice is not None and kind == "tool":
        return by_name(functions, choice.name)
    return chosen(functions, "required" if kind in ("any", "tool") else kind, parallel=parallel)
