"""Regular expressions and JSON schemas, sound ones and others."""

from __future__ import annotations

import random
from typing import Any

from tests.chaos.fleet import GENERATE
from tests.fuzz import odd
from tests.fuzz.input import Input

PIECES = (
    "a", "b", "ab", ".", "[a-z]", "[^b]", "\\d", "\\w+", "\\s", "(", ")", "(?:", "(?=", "(?!", "(?<=", "|", "*", "+",
    "?", "{3}",
    "{2,}", "{1000000}", "{,5}", "[", "]", "\\", "^", "$", "\\b", "\\1", "(?P<x>a)", "(?i)", "\\u1234", "\\p{L}",
    "\\x00", "é", "😀",
    "(a*)*", "(a|a)*", "[\\x{10ffff}]", "{", "}", "\\Q", "(?#x)", "\n", "\ud800", "(((((((((a)))))))))",
)  # fmt: skip
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"type": "integer"}},
    "required": ["a"]},
    {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"const": "ab"}, {"type": "boolean"}]},
    {"$defs": {"t": {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"},
    {"type": "string", "pattern": "^[a-z]{1,4}$", "format": "date"},
    {"type": ["string", "null"], "allOf": [{"minLength": 1}, {"maxLength": 5}], "additionalProperties": False},
)  # fmt: skip
WORDS = (
    "type", "properties", "required", "items", "prefixItems", "enum", "const", "anyOf", "oneOf", "allOf", "not",
    "if", "then", "else",
    "$ref", "$defs", "pattern", "patternProperties", "format", "minimum", "maximum", "multipleOf", "minLength",
    "maxLength",
    "minItems", "maxItems", "uniqueItems", "contains", "dependentRequired", "unevaluatedProperties", "propertyNames",
    "$schema", "$id",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    "object", "array", "string", "integer", "#", "#/$defs/t", "#/nowhere", "http://127.0.0.1:1/x", "^(a+)+$",
    "(?=a)", "uuid", 0, -1, 3,
    10**12, 1e-9, {}, [], True, False, [{}], {"type": "string"}, {"$ref": "#"}, {"a": {}}, ["a", "a"], 123_456_789,
    None,
)  # fmt: skip


def draw(chance: random.Random, number: int) -> Input:
    given: dict[str, Any] = {"regex": _regex(chance)} if chance.random() < 0.5 else {"json_schema": _schema(chance)}
    options = {
        "max_tokens": 12,
        "temperature": chance.choice((0.0, 0.9)),
        "n": chance.choice((1, 1, 3)),
        "seed": number,
    } | given

    return Input(
        odd.shown(given), lambda world: world.judged(lambda: world.client.generate("ab", model=GENERATE, **options))
    )


def _regex(chance: random.Random) -> str:
    pieces = [chance.choice(PIECES) for _ in range(chance.randint(1, 12))]
    return "".join(pieces) * chance.choice((1, 1, 1, 1, 60))


def _schema(chance: random.Random) -> dict[str, Any]:
    made = odd.spoiled(chance, chance.choice(SCHEMAS), _part)
    return made if isinstance(made, dict) else {"type": made}


def _part(chance: random.Random) -> Any:
    if chance.random() < 0.2:
        return odd.json_value(chance)
    if chance.random() < 0.5:
        return chance.choice(VALUES)
    return {
        chance.choice(WORDS): chance.choice((*VALUES, {chance.choice(WORDS): chance.choice(VALUES)})) for _ in range(3)
    }
