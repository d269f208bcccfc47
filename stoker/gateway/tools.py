"""Tools that a model may call: what is asked of it, and what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from stoker.contract.shown import brief
from stoker.gateway.errors import Refused
from stoker.gateway.fields import Body

#: What `tool_choice` may be as a text.
CHOICES = ("none", "required")


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def as_template(self) -> dict[str, object]:
        described = {"name": self.name, "description": self.description or ""}
        return {"type": "function", "function": {**described, "parameters": self.schema_of_arguments}}

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters if self.parameters is not None else {"type": "object"}


class Tool(Body):
    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class Forced:
    """The model has to call a function: the one of that name, or (None) any."""

    name: str | None
    functions: tuple[Function, ...]

    @property
    def schema(self) -> dict[str, Any]:
        """What its answer has to be: the arguments of the one, or an object with name and arguments of any."""
        if self.name is not None:
            return next(function.schema_of_arguments for function in self.functions if function.name == self.name)
        return {"anyOf": [_call_schema(function) for function in self.functions]}

    def call(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of the call that the whole answer is; None for one that was cut off before its end."""
        if self.name is not None:
            return self.name, text
        try:
            made = json.loads(text)
            return str(made["name"]), json.dumps(made["arguments"], ensure_ascii=False)
        except (ValueError, LookupError, TypeError, RecursionError):
            return None


def _call_schema(function: Function) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": function.schema_of_arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def forced(tools: list[Tool], choice: object) -> Forced | None:
    """What `tool_choice` asks for; None: no tool is called. Raises `Refused`."""
    functions = tuple(tool.function for tool in tools)
    if not functions:
        if choice not in (None, "none", "auto"):
            raise _refused("given without tools; say which there are in tools")
        return None
    if choice == "none":
        return None
    if choice == "required":
        return Forced(None, functions)
    named = _named(choice)
    if named is not None:
        if all(function.name != named for function in functions):
            raise _refused(f"{brief(named)} given; tools has {', '.join(function.name for function in functions)}")
        return Forced(named, functions)
    given = "auto, which is the default where tools are given," if choice in (None, "auto") else brief(choice)
    raise _refused(
        f"{given} is not supported; allowed: {', '.join(CHOICES)}, and "
        'a function by name, {"type": "function", "function": {"name": …}}'
    )


def _named(choice: object) -> str | None:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _refused(why: str) -> Refused:
    return Refused(400, f"tool_choice: {why}.", param="tool_choice", code="unsupported_parameter")
