"""Reads the loops of a Metal text, and says of which it cannot prove that they end."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LOOP = re.compile(r"\b(for|while|do|goto)\b")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[xyz])?")
_DEFINED = re.compile(r"\bconst(?:expr)? (?:uint|int|size_t) (\w+) = ([^;]+);")
#: What a launch fixes: its threads, and templates and constants, in capitals.
_FIXED = re.compile(r"threads_per_threadgroup\.x|[A-Z][A-Z0-9_]*")
#: A cast, and the shape of an input.
_CAST, _SHAPE = re.compile(r"\b(?:uint|int|size_t)(?=\()"), re.compile(r"\b\w+_shape\[\d\]")
_NUMBER = re.compile(r"\b(?:0x[0-9a-f]+|\d+)u?\b")


def unbounded(text: str) -> list[str]:
    """The loops that may not end: anything except `for (T i = A; i < B; i++)` and the like, whose `i` the body leaves
    alone, and whose B is made of templates, constants, threads and shapes, or is at most such a number by `min`."""
    text = re.sub(r"//[^\n]*", "", text)
    found = _DEFINED.findall(text)
    constants = {name: value for name, value in found if [other for other, _ in found].count(name) == 1}
    return [problem for match in _LOOP.finditer(text) if (problem := _problem(text, match, constants))]


def _problem(text: str, match: re.Match[str], constants: dict[str, str]) -> str | None:
    if match[1] != "for":
        return f"a {match[1]}"
    end = _closing(text, text.index("(", match.end()))
    head = text[text.index("(", match.end()) + 1 : end]
    parts = [part.strip() for part in head.split(";")]
    begin = re.fullmatch(r"(?:uint|int) (\w+) = (.+)", parts[0])
    if len(parts) != 3 or begin is None:
        return head
    name = begin[1]
    if re.search(rf"\b{name}\b\s*([-+*/|&]|<<|>>)?=[^=]|(\+\+|--){name}\b|\b{name}(\+\+|--)", _body(text, end + 1)):
        return f"{head}: its body changes {name}"
    return (
        None if any(_ends(name, condition.strip(), parts[2], constants) for condition in parts[1].split("&&")) else head
    )


def _ends(name: str, condition: str, step: str, constants: dict[str, str]) -> bool:
    if re.fullmatch(rf"{name} > [^<>=]+", condition) and step == f"{name} >>= 1":
        return True  # of an unsigned number: it comes to 0
    upwards = re.fullmatch(rf"{name} < (.+)", condition)
    by = re.fullmatch(rf"{name} \+= (.+)", step)
    counts = step == f"{name}++" or (by is not None and fixed(by[1], constants))
    return upwards is not None and counts and bounded(upwards[1], constants)


def fixed(expression: str, constants: dict[str, str]) -> bool:
    """Whether the launch alone decides what it is."""
    names = _NAME.findall(_NUMBER.sub("", _SHAPE.sub("", _CAST.sub("", expression))))
    return not set("|?") & set(expression) and all(
        _FIXED.fullmatch(name) or (name in constants and fixed(constants[name], _without(constants, name)))
        for name in names
    )


def bounded(expression: str, constants: dict[str, str]) -> bool:
    """Whether what the launch decides is at least as large."""
    expression = expression.strip()
    if fixed(expression, constants):
        return True
    if expression in constants:
        return bounded(constants[expression], _without(constants, expression))
    least = re.match(r"metal::min\(", expression)
    if least is None or _closing(expression, least.end() - 1) != len(expression) - 1:
        return False
    return any(bounded(argument, constants) for argument in _arguments(expression[least.end() : -1]))


def _without(constants: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in constants.items() if key != name}


def _arguments(inside: str) -> Iterator[str]:
    depth, begin = 0, 0
    for at, letter in enumerate(inside):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            yield inside[begin:at]
            begin = at + 1
    yield inside[begin:]


def _closing(text: str, opening: int) -> int:
    """Where the bracket at `opening` is closed."""
    pairs = {"(": ")", "{": "}"}
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == text[opening]) - (text[at] == pairs[text[opening]])
        if depth == 0:
            return at
    raise ValueError(f"a bracket that is never closed: {text[opening : opening + 60]!r}")


def _body(text: str, start: int) -> str:
    """The statement at `start`: a block, a loop with its own, or what comes before the next semicolon."""
    rest = text[start:].lstrip()
    if rest.startswith("{"):
        return rest[: _closing(rest, 0) + 1]
    head = re.match(r"(?:for|if) \(", rest)
    if head:
        end = _closing(rest, head.end() - 1) + 1
        return rest[:end] + _body(rest, end)
    return rest[: rest.index(";") + 1]
