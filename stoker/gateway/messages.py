"""Conversations as OpenAI's clients send them, as messages for a model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from stoker.contract.shown import as_json
from stoker.gateway.fields import Body, Items


def _text(value: Any) -> Any:
    """A text, or its parts joined."""
    if not isinstance(value, list):
        return value
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"part {number} is {as_json(kind)}; allowed: parts of type text. Models here read texts alone"
            )
        texts.append(part["text"])
    return "".join(texts)


Content = Annotated[str, BeforeValidator(_text)]


class CalledFunction(Body):
    name: str
    arguments: str
    #: What OpenAI's package made of the arguments, and sends back with them.
    parsed_arguments: Any = None

    @field_validator("arguments")
    @classmethod
    def _object(cls, value: str) -> str:
        try:
            given = json.loads(value or "{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ValueError(f"{as_json(value)} given; expected the text of a JSON object")
        return value


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_template(self) -> dict[str, Any]:
        """As chat templates take it: with the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments or "{}")}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessageBody(Body):
    #: OpenAI's own answers have it.
    IDLE: ClassVar[Mapping[str, object]] = {"annotations": []}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(default=None, validate_default=True)
    #: As answers have it: some templates show a model what it thought before.
    reasoning_content: str | None = None
    #: What OpenAI's package made of the content, and sends back with it.
    parsed: Any = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content")
    @classmethod
    def _said(cls, content: str | None, known: ValidationInfo) -> str | None:
        role = known.data.get("role", "assistant")
        if content is None and role != "assistant":
            raise ValueError(f"missing; a message of role {role} has one")
        return content

    def as_template(self) -> dict[str, object]:
        """As the contract takes it. A developer's message is what templates call the system's. Many templates write
        the content of each message without a look at it: one with calls alone has an empty one."""
        message: dict[str, object] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content or ""
        for name in ("reasoning_content", "name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [call.as_template() for call in self.tool_calls]
        return message
