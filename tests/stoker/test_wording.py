"""What is wrong with a field is said in Stoker's words: what was given, what is allowed. None of pydantic's remain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stoker.contract import GenerateRequest
from stoker.contract.base import Message
from stoker.contract.codec import build
from stoker.contract.wording import refusal
from stoker.errors import ConfigError, InvalidRequest
from stoker.settings import Settings, load_settings

#: Of all kinds and sizes; each is wrong for some field.
WRONG: list[Any] = [
    None, True, 0, 1, -1, 7, 2**63, 10**400, "9" * 5000, 0.0, 1.5, -1e-9, 1e300, float("nan"), float("inf"),
    "", " ", "x", "1", "²", "a b", "x" * 2_000_000, "\ud800", b"x", b"\xff", object(), ...,
    [], ["x"], [""], [None], [1.5], [True], [b"x"], [[]], ["x"] * 5000, [{}], [{"x": 1}], [{1: 1}],
    {}, {"x": 1}, {1: 1}, {-1: 1}, {1: 1e9}, {1: float("nan")}, {"x": {}}, dict.fromkeys(range(2000), 1.0), {"x": "y"},
    {b"\xff": 1}, {"x"}, frozenset({1}), range(3), iter([]), GenerateRequest(model="m", prompt="x"),
]  # fmt: skip
#: As pydantic speaks: of Python's types, of an input, of what should be.
ITS_WORDS = re.compile(
    r"\b(should|input|inputs|string|tuple|dictionary|dict|integer|boolean|valid|parse|instance|argument|Extra|Field)\b"
)
#: What is said of a kind of error that has no words of its own.
NO_WORDS = "another value"


def all_of(base: type[BaseModel], package: str) -> list[type[BaseModel]]:
    """Every class below `base` that the package has."""
    found, pending = [], [base]
    while pending:
        pending += (one := pending.pop()).__subclasses__()
        if one.__module__.startswith(package):
            found.append(one)
    return sorted(set(found), key=lambda one: (one.__module__, one.__qualname__))


def problems(model: type[BaseModel]) -> Iterator[ErrorDetails]:
    """What pydantic finds wrong with each field of `model`, given each of `WRONG`."""
    for name, field in model.model_fields.items():
        for value in WRONG:
            try:
                model(**{field.alias or name: value})
            except ValidationError as error:
                yield from (found for found in error.errors() if found["type"] != "extra_forbidden")


def check_words(problem: ErrorDetails) -> None:
    said = refusal(problem)
    assert NO_WORDS not in said, problem["type"]
    assert not ITS_WORDS.search(said), said
    if problem["type"] == "missing":
        assert said == "missing; it has to be given"
    elif problem["type"] != "value_error":
        assert re.fullmatch(r"(?s).+ given; expected .+", said), said


def settings_error(name: str, value: Any) -> str:
    try:
        load_settings(**cast(Any, {name: value}))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("message", all_of(Message, "stoker.contract"), ids=lambda one: one.__name__)
def test_a_field_of_any_message_is_refused_in_words_that_pydantic_does_not_have(message: type[Message]) -> None:
    seen = set()
    for problem in problems(message):
        check_words(problem)
        seen.add(problem["type"])
    assert seen or not message.model_fields


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_is_refused_in_words_that_pydantic_does_not_have(name: str) -> None:
    for value in WRONG[1:]:
        said = settings_error(name, value)
        assert NO_WORDS not in said
        assert not ITS_WORDS.search(said), said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stop": ["x"] * 17}, "stop: 17 items given; expected at most 16 items."),
        ({"stop": [""]}, "stop.0: '' given; expected at least 1 character."),
        ({"stop": ["x" * 257]}, "stop.0: 257 characters given; expected at most 256 characters."),
        ({"max_tokens": "many"}, "max_tokens: 'many' given; expected a whole number."),
        ({"max_tokens": 1.5}, "max_tokens: 1.5 given; expected a whole number."),
        ({"max_tokens": 0}, "max_tokens: 0 given; expected at least 1."),
        ({"temperature": "warm"}, "temperature: 'warm' given; expected a number."),
        ({"temperature": float("nan")}, "temperature: nan given; expected a number that is finite."),
        ({"temperature": 11}, "temperature: 11 given; expected at most 10."),
        ({"deadline": 0}, "deadline: 0 given; expected more than 0."),
        ({"seed": 2**63}, "seed: 9223372036854775808 given; expected less than 9223372036854775808."),
        ({"ignore_eos": "maybe"}, "ignore_eos: 'maybe' given; expected true or false."),
        ({"json_schema": "x"}, "json_schema: 'x' given; expected an object."),
        ({"logit_bias": {-1: 0.5}}, "logit_bias.-1: -1 given; expected at least 0."),
        ({"tools": 7}, "tools: 7 given; expected a list."),
        ({"regex": 7}, "regex: 7 given; expected a text."),
        ({"model": "A B"}, "model: 'A B' given; expected 1 to 64 of a-z, 0-9, dot, dash and underscore, the first a letter or digit."),  # noqa: E501
        ({"model": None}, "model: None given; expected a text."),
        ({"adapter": "a@0"}, "adapter: 'a@0' given; expected NAME or NAME@VERSION, the name 1 to 64 of a-z, 0-9, dot, dash and underscore, the first a letter or digit."),  # noqa: E501
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_given_and_what_is_allowed(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{re.escape(said)}$"):
        build(GenerateRequest, {"model": "m", "prompt": "x", **fields})


def test_what_is_missing_has_to_be_given() -> None:
    with pytest.raises(InvalidRequest, match=r"^model: missing; it has to be given\.$"):
        build(GenerateRequest, {"prompt": "x"})
