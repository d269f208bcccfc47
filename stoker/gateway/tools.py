"""Tools that a model may call: what is asked of it, and what it says."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from stoker.client.options import GenerateOptions
from stoker.contract.freeform import MAX_DEPTH
from stoker.contract.parts import ArgumentsReader, Reader, TextReader
from stoker.contract.reasoning import ReasoningReader
from stoker.contract.shown import as_json
from stoker.contract.tool_calls import CallReader
from stoker.gateway.errors import Refused
from stoker.gateway.fields import Body

#: What `tool_choice` may be as a text.
CHOICES = ("none", "auto", "required")


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
class Choice:
    """What becomes of the functions of a request. `mode`: `none` is called, the model decides (`auto`), or it has to
    call one (`required`): that of `name`, or (None) any. `parallel`: it may call several in one answer."""

    mode: Literal["none", "auto", "required"] = "none"
    functions: tuple[Function, ...] = ()
    name: str | None = None
    parallel: bool = True

    @property
    def schema(self) -> dict[str, Any] | None:
        """What an answer that has to be a call is: the arguments of the one, or an object with name and arguments of
        any. None: it is free."""
        if self.mode != "required":
            return None
        if self.name is not None:
            return next(function.schema_of_arguments for function in self.functions if function.name == self.name)
        return {"anyOf": [_call_schema(function, at) for at, function in enumerate(self.functions)]}

    def schema_of_answer(self, asked: dict[str, Any] | None, regex: str | None, rules: str) -> dict[str, Any] | None:
        """The schema that the answer has: `asked`, as the request says it, or that of a call. `rules`: the fields by
        which a request says what an answer looks like. Raises `Refused` where both are asked for."""
        if self.mode == "none":
            return asked
        if asked is not None or regex is not None:
            message = f"tool_choice: {self.mode} lets functions be called, which {rules} rules out; say none."
            raise Refused(400, message, param="tool_choice", code="invalid_value")
        return self.schema

    def reader(self, *, in_reasoning: bool = False) -> ReasoningReader:
        """Of one answer."""
        return ReasoningReader(self._reader(), in_reasoning=in_reasoning)

    def _reader(self) -> Reader:
        if self.mode == "none":
            return TextReader()
        if self.name is not None:
            return ArgumentsReader(self.name)
        schemas = {function.name: function.schema_of_arguments for function in self.functions}
        return CallReader(schemas, parallel=self.parallel)


def tool_options(functions: Sequence[Function], schema: dict[str, Any] | None) -> GenerateOptions:
    """What a job is asked that may call `functions`, and whose answer has to fit `schema`, if that is not None."""
    options = GenerateOptions()
    if functions:
        options["tools"] = [function.as_template() for function in functions]
    if schema is not None:
        options["json_schema"] = schema
    return options


#: Keywords whose value has schemas under names.
_NAMES_OF = ("properties", "patternProperties", "$defs", "definitions")
#: Keywords whose value is no schema.
_PLAIN = ("const", "enum", "default", "examples")


def _call_schema(function: Function, at: int) -> dict[str, Any]:
    arguments = _moved(function.schema_of_arguments, f"#/anyOf/{at}/properties/arguments", MAX_DEPTH)
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str, depth: int) -> Any:
    """`schema` with its references as they are where its own root stands at `root`. What has an `$id` is the root of
    its own references. `depth`: so deep it is looked through; a deeper one is refused with the request."""
    if isinstance(schema, list) and depth:
        return [_moved(item, root, depth - 1) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema or not depth:
        return schema
    return {name: _moved_keyword(name, value, root, depth - 1) for name, value in schema.items()}


def _moved_keyword(name: str, value: Any, root: str, depth: int) -> Any:
    if name == "$ref":
        within = isinstance(value, str) and (value == "#" or value.startswith("#/"))
        return root + value[1:] if within else value
    if name in _PLAIN:
        return value
    if name in _NAMES_OF and isinstance(value, dict) and depth:
        return {inner: _moved(schema, root, depth - 1) for inner, schema in value.items()}
    return _moved(value, root, depth)


def chosen(functions: Sequence[Function], choice: object, *, parallel: bool = True) -> Choice:
    """What `tool_choice` asks for, as chats have it. Raises `Refused`."""
    known = tuple(functions)
    _check_names(known)
    if not known and choice not in (None, "none", "auto"):
        raise _refused("given without tools; say which there are in tools")
    if not known or choice == "none":
        return Choice()
    if choice in (None, "auto"):
        return Choice("auto", known, parallel=parallel)
    if choice == "required":
        return Choice("required", known, parallel=parallel)
    named = _named(choice)
    if named is None:
        raise _refused(
            f"{as_json(choice)} is not supported; allowed: {', '.join(CHOICES)}, and "
            'a function by name, {"type": "function", "function": {"name": …}}'
        )
    return by_name(known, named)


def by_name(functions: tuple[Function, ...], name: str | None) -> Choice:
    """Raises `Refused`."""
    _check_names(functions)
    if all(function.name != name for function in functions):
        raise _refused(f"{as_json(name)} given; tools has {', '.join(function.name for function in functions)}")
    return Choice("required", functions, name)


def _check_names(functions: Sequence[Function]) -> None:
    twice = next((name for name, times in Counter(each.name for each in functions).items() if times > 1), None)
    if twice is not None:
        message = f"tools: {twice} is there twice; a call would not say which of them is meant. Give each its own name."
        raise Refused(400, message, param="tools", code="invalid_value")


def _named(choice: object) -> str | None:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _refused(why: str) -> Refused:
    return Refused(400, f"tool_choice: {why}.", param="tool_choice", code="unsupported_parameter")


def call_id(job_id: str, completion: int, number: int) -> str:
    """Of the call with this number in a completion. Mistral's templates take nine letters and digits, nothing else."""
    return hashlib.sha256(f"{job_id} {completion} {number}".encode()).hexdigest()[:9]
