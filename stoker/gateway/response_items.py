"""What goes into and out of `/v1/responses`: items of a conversation, functions, the form of the text."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stoker.contract.shown import as_json
from stoker.gateway.fields import Body, check_schema
from stoker.gateway.tools import Function

_PARTS = ("input_text", "output_text")


def items_of(value: Any) -> Any:
    """A text is what the user says."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _text(value: Any) -> Any:
    return _joined(value, _PARTS) if isinstance(value, list) else value


def _joined(parts: list[Any], allowed: tuple[str, ...]) -> str:
    """The texts of `parts`. Raises `ValueError` for one of another type than those `allowed`."""
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") not in allowed or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"part {number} is {as_json(kind)}; allowed: {', '.join(allowed)}, each with its text")
    return "".join(part["text"] for part in parts)


def _reasoning(fields: dict[str, Any]) -> str:
    """What an item of reasoning says: its content, else its summary. Raises `ValueError`."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in sorted(given.keys() - {"type", "id", "status", "content", "summary"}):
        raise ValueError(f"{name} given; an item of type reasoning has content, summary")
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        parts = given.get(name, [])
        if not isinstance(parts, list):
            raise ValueError(f"{name} is {as_json(parts)}; expected a list of parts of type {kind}")
        if parts:
            return _joined(parts, (kind,))
    raise ValueError("nothing given; an item of type reasoning has content or summary")


#: Type of an item → the fields that it must have; `id` and `status`, as answers have them, may come back.
FIELDS = {
    "message": frozenset({"role", "content"}),
    "function_call": frozenset({"call_id", "name", "arguments"}),
    "function_call_output": frozenset({"call_id", "output"}),
    "reasoning": frozenset({"thought"}),
}


class Item(Body):
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[str, BeforeValidator(_text)] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[str, BeforeValidator(_text)] | None = None
    id: str | None = None
    status: str | None = None
    #: Of an item of reasoning: its text.
    thought: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _thought(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("type") != "reasoning":
            return fields
        return {"type": "reasoning", "thought": _reasoning(fields)}

    @model_validator(mode="after")
    def _whole(self) -> Item:
        needed, given = FIELDS[self.type], self.model_fields_set - {"type", "id", "status"}
        if given != needed:
            said, has = ", ".join(sorted(given)), ", ".join(sorted(needed))
            raise ValueError(f"{said or 'nothing'} given; an item of type {self.type} has {has}")
        if self.arguments is not None:
            _arguments(self.arguments)
        return self

    def as_template(self) -> dict[str, object]:
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}
        if self.type == "function_call":
            function = {"name": self.name, "arguments": _arguments(self.arguments or "")}
            call = {"id": self.call_id, "type": "function", "function": function}
            # Many templates write the content of each message without a look at it.
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


def conversation_of(items: list[Item]) -> list[dict[str, object]]:
    """As messages for a template: what the assistant thought is a part of what it says next, and calls of the message
    that they came with, as the model wrote them."""
    messages, thought = list[dict[str, object]](), ""
    for item in items:
        if item.thought is not None:
            thought += item.thought
            continue
        message = item.as_template()
        if thought and message["role"] != "assistant":
            messages.append(_thinking(thought))
            thought = ""
        if thought:
            messages.append({**message, "reasoning_content": thought})
        elif messages and _goes_on(messages[-1], message):
            messages[-1] = _with(messages[-1], message)
        else:
            messages.append(message)
        thought = ""
    return [*messages, _thinking(thought)] if thought else messages


def _goes_on(before: dict[str, object], message: dict[str, object]) -> bool:
    """Whether both are of one answer: what the assistant says next to its calls is one message with them."""
    called = "tool_calls" in before or "tool_calls" in message
    return called and before["role"] == message["role"] == "assistant"


def _with(before: dict[str, Any], message: dict[str, Any]) -> dict[str, object]:
    """One message of both: their texts joined, their calls in order."""
    both = before.keys() & message.keys() - {"role"}
    return {**before, **message, **{name: before[name] + message[name] for name in both}}


def _thinking(thought: str) -> dict[str, object]:
    """Of an assistant that said nothing."""
    return {"role": "assistant", "content": "", "reasoning_content": thought}


def _arguments(text: str) -> dict[str, Any]:
    try:
        # OpenAI's own answers, and many clients, have "" for a function without parameters.
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"arguments: {as_json(text)} given; expected the text of a JSON object")
    return found


class FunctionTool(Body):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = True

    @property
    def function(self) -> Function:
        return Function(name=self.name, description=self.description, parameters=self.parameters)


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    #: Answers always fit the schema.
    strict: bool = True

    def schema_of_answer(self) -> dict[str, Any] | None:
        check_schema("text.format.schema", self.type, given=self.schema_ is not None)
        return {"type": "object"} if self.type == "json_object" else self.schema_


def choice_of(choice: str | dict[str, Any] | None) -> object:
    """`tool_choice` as chats have it: with the function's name one level deeper."""
    if isinstance(choice, dict) and set(choice) == {"type", "name"}:
        return {"type": choice["type"], "function": {"name": choice["name"]}}
    return choice
