"""The schema of an answer that has to be a call of any function."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from stoker.gateway.tools import Choice, Function

COLOR = {"type": "string", "enum": ["red", "blue"]}
#: As pydantic, and so `openai.pydantic_function_tool`, writes a field of a class of its own.
PAINT: dict[str, Any] = {
    "type": "object", "properties": {"color": {"$ref": "#/$defs/Color"}, "next": {"anyOf": [{"$ref": "#"}]}},
    "required": ["color"], "$defs": {"Color": COLOR},
}  # fmt: skip


def forced(*schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call of any of the functions that have these arguments."""
    functions = [Function(name=f"f{at}", parameters=schema) for at, schema in enumerate(schemas)]
    schema = Choice("required", tuple(functions)).schema
    assert schema is not None
    return schema


def arguments(schema: dict[str, Any], at: int) -> dict[str, Any]:
    found: dict[str, Any] = schema["anyOf"][at]["properties"]["arguments"]
    return found


def found(schema: Any, pointer: str) -> Any:
    for name in pointer.removeprefix("#/").split("/"):
        schema = schema[int(name)] if isinstance(schema, list) else schema[name]
    return schema


def test_references_of_each_function_lead_to_its_own_definitions() -> None:
    other = {**PAINT, "$defs": {"Color": {"type": "integer"}}}
    schema = forced(PAINT, other)
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    for at, color in enumerate((COLOR, {"type": "integer"})):
        properties = arguments(schema, at)["properties"]
        assert found(schema, properties["color"]["$ref"]) == color
        assert found(schema, properties["next"]["anyOf"][0]["$ref"]) == arguments(schema, at)
    assert PAINT["properties"]["color"] == {"$ref": "#/$defs/Color"}, "what the template is shown stays as it was given"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"const": {"$ref": "#/b"}}}},
        {"type": "object", "properties": {"a": {"enum": [{"$ref": "#"}], "default": {"$ref": "#"}}}},
        {"$id": "https://example.org/a", "type": "object", "properties": {"a": {"$ref": "#/$defs/B"}}},
        {"type": "object", "properties": {"a": {"$ref": "https://example.org/b#/c"}}},
        {"type": "object", "properties": {"$ref": {"type": "string"}}},
    ],
)
def test_what_is_no_reference_within_the_function_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert arguments(forced(schema), 0) == schema


def test_an_argument_that_is_called_as_a_keyword_may_have_a_reference() -> None:
    schema = {"type": "object", "properties": {"default": {"$ref": "#/$defs/A"}}, "$defs": {"A": COLOR}}
    made = forced(schema)
    assert found(made, arguments(made, 0)["properties"]["default"]["$ref"]) == COLOR


def test_a_schema_that_is_nested_too_deep_is_handed_on_for_the_request_to_be_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"items": deep}
    assert arguments(forced(deep), 0).keys() == {"items"}
