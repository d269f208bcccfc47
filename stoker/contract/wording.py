"""What pydantic finds wrong with a value, in Stoker's words: what was given, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pydantic_core import ErrorDetails

from stoker.contract.names import Rule
from stoker.contract.shown import as_json, brief

#: A value in words.
Show: TypeAlias = Callable[[object], str]
#: Patterns of fields, as words. One that is not here is shown itself.
_PATTERNS = {
    rf"^{Rule.NAME.pattern}$": Rule.NAME.allowed,
    rf"^{Rule.JOB_ID.pattern}$": Rule.JOB_ID.allowed,
    rf"^{Rule.NAME.pattern}(@{Rule.VERSION.pattern})?$": f"NAME or NAME@VERSION, the name {Rule.NAME.allowed}",
}

_WHOLE, _NUMBER, _TRUTH, _TEXT, _LIST, _OBJECT = (
    "a whole number",
    "a number",
    "true or false",
    "a text",
    "a list",
    "an object",
)
#: Types of errors that say which kind of value belongs there.
_KINDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), _WHOLE),
    "int_parsing_size": "a whole number of fewer digits",
    **dict.fromkeys(("float_type", "float_parsing"), _NUMBER),
    "finite_number": "a number that is finite",
    **dict.fromkeys(("bool_type", "bool_parsing"), _TRUTH),
    **dict.fromkeys(("string_type", "string_sub_type"), _TEXT),
    "string_unicode": "a text in UTF-8",
    "bytes_type": "bytes",
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type"), _LIST),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), _OBJECT),
    "path_type": "a path",
    "none_required": "nothing",
    "recursion_loop": "a value that does not contain itself",
    "invalid_key": "names that are texts",
}
#: Types of errors whose choices pydantic lists, in quotes of Python's.
_CHOICES, _TAGS = ("literal_error", "enum"), ("union_tag_invalid", "union_tag_not_found")
_QUOTING = (*_CHOICES, *_TAGS)


def refusal(problem: ErrorDetails, show: Show = brief) -> str:
    """Of one of `ValidationError.errors()`: what was given and what is allowed, for behind the field's name. `show` is
    `as_json` for what comes out of JSON."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        # A validator of Stoker's own: it says both.
        return problem["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "missing; it has to be given"
    if kind in _SIZES:
        return _SIZES[kind](problem["input"], context, show)
    expected = _expected(kind, context)
    if show is as_json and kind in _QUOTING:
        expected = expected.replace("'", '"')
    return f"{show(problem['input'])} given; expected {expected}"


def _expected(kind: str, context: Mapping[str, Any]) -> str:
    if kind in _KINDS:
        return _KINDS[kind]
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{words} {str(context[bound]).removesuffix('.0')}"
    if kind in _CHOICES:
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        pattern = str(context["pattern"])
        return _PATTERNS.get(pattern) or f"a text of the form {pattern}"
    if kind in _TAGS:
        tags = context.get("expected_tags")
        return f"an object whose {context['discriminator']} is one of {tags}" if tags else _OBJECT
    return "another value; the documentation of this field says which"


#: Types of errors of numbers beyond a bound, in words, and which entry of the context is the bound.
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _too_few(value: object, context: Mapping[str, Any], show: Show) -> str:
    return f"{show(value)} given; expected at least {_count(context['min_length'], 'item')}"


def _too_many(_: object, context: Mapping[str, Any], __: Show) -> str:
    # pydantic stops to count behind the last that is allowed, where it reads them one by one.
    given = "more items" if context["actual_length"] is None else _count(context["actual_length"], "item")
    return f"{given} given; expected at most {_count(context['max_length'], 'item')}"


def _too_short(value: object, context: Mapping[str, Any], show: Show) -> str:
    return f"{show(value)} given; expected at least {_count(context['min_length'], 'character')}"


def _too_long(value: object, context: Mapping[str, Any], show: Show) -> str:
    given = _count(len(value), "character") if isinstance(value, str) else show(value)
    return f"{given} given; expected at most {_count(context['max_length'], 'character')}"


#: Types of errors of what is too small or too large: what was given is said by its size.
_SIZES: Mapping[str, Callable[[object, Mapping[str, Any], Show], str]] = {
    "too_short": _too_few,
    "too_long": _too_many,
    "string_too_short": _too_short,
    "string_too_long": _too_long,
}
