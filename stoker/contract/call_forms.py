"""Calls of functions in forms that are not JSON as a whole: Mistral's newer one, and that of Qwen3-Coder.

They know neither which functions there are nor what they take, apart from the schemas that they are given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

#: Behind the name of Mistral's form, and how Qwen3-Coder's begins.
ARGS, CALL_ID, XML = "[ARGS]", "[CALL_ID]", "<function="
#: What stands within a value of Qwen3-Coder's form is a part of it.
VALUE, VALUE_END = "<parameter=", "</parameter>"
_NAMED = re.compile(r"\s*(?:\[TOOL_CALLS\]\s*)?([\w-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)", re.ASCII)
_FUNCTION = re.compile(r"\s*<function=([^<>]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>]+)>(.*?)</parameter>\s*", re.DOTALL)
#: Python's words for JSON's.
_WORDS = {"True": "true", "False": "false", "None": "null"}

#: The names of functions, each with the JSON schema of its arguments.
Functions = Mapping[str, Mapping[str, Any]]


def named_calls(text: str) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Name and arguments of the whole calls like `NAME[ARGS]{…}` that `text` begins with, one behind the other, with
    their markers or without, and where the last of them ends."""
    found: list[tuple[str, dict[str, Any]]] = []
    decoder, end = json.JSONDecoder(), 0
    while (match := _NAMED.match(text, end)) is not None:
        try:
            arguments, end = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            break
        found.append((match[1], arguments))
    return found, end


def xml_call(text: str, functions: Functions) -> tuple[str, dict[str, Any]]:
    """Name and arguments of `<function=NAME><parameter=KEY>VALUE</parameter>…</function>`. Raises `ValueError` for what
    is none."""
    match = _FUNCTION.fullmatch(text)
    if match is None or match[1].strip() not in functions:
        raise ValueError("no call of a function of the request")
    name, body, at = match[1].strip(), match[2], 0
    properties = functions[name].get("properties")
    arguments: dict[str, Any] = {}
    while body[at:].strip():
        found = _PARAMETER.match(body, at)
        if found is None or found[1] in arguments:
            raise ValueError("no arguments")
        schema = properties.get(found[1]) if isinstance(properties, Mapping) else None
        arguments[found[1]] = _value(found[2].removeprefix("\n").removesuffix("\n"), _types(schema))
        at = found.end()
    return name, arguments


def _types(schema: object) -> frozenset[str]:
    """The types that a value may have; none: nothing is said of it."""
    if not isinstance(schema, Mapping):
        return frozenset()
    stated = schema.get("type")
    types = {name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)}
    for keyword in ("anyOf", "oneOf"):
        forms = schema.get(keyword)
        types.update(*(_types(form) for form in (forms if isinstance(forms, list) else ())))
    enum = schema.get("enum")
    if not types and isinstance(enum, list) and any(isinstance(value, str) for value in enum):
        return frozenset({"string"})
    return frozenset(types)


def _value(text: str, types: frozenset[str]) -> Any:
    """A text where one is asked for; else what it is as JSON, or a text if it is none."""
    written = _WORDS.get(text.strip(), text) if types - {"string"} else text
    if "string" in types:
        return None if "null" in types and written.strip() == "null" else text
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return text
