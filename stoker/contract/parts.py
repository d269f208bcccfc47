"""What a model's answer consists of: reasoning, texts and calls of functions, whole or part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class Begun:
    """A call begins."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of the arguments of the call that has begun last."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """What a model thinks before it answers, or a part of that."""

    text: str


#: Of an answer: a part of its text, of its reasoning, or of a call.
Part: TypeAlias = str | Reasoning | Begun | Arguments


@dataclass(frozen=True)
class FunctionCall:
    """`arguments`: JSON of an object, unless the answer was cut off in it."""

    name: str
    arguments: str


#: Of an answer: a text, a reasoning or a call, whole.
Item: TypeAlias = str | Reasoning | FunctionCall


class Reader(Protocol):
    """Reads one answer. What its parts join to does not depend on how the text was split into pieces."""

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, once the answer has ended."""
        ...


class TextReader:
    """Of a request that has no call to find."""

    def feed(self, text: str) -> list[Part]:
        return [text] if text else []

    def finish(self) -> list[Part]:
        return []


class ArgumentsReader:
    """Of an answer that is the arguments of a function which the request has named."""

    def __init__(self, name: str) -> None:
        self._begun: list[Part] = [Begun(name)]

    def feed(self, text: str) -> list[Part]:
        begun, self._begun = self._begun, []
        return [*begun, Arguments(text)] if text else begun

    def finish(self) -> list[Part]:
        return self.feed("")


def items_of(reader: Reader, text: str) -> list[Item]:
    """The items of a whole answer, in their order."""
    items: list[Item] = []
    for part in reader.feed(text) + reader.finish():
        add(items, part)
    return items


def add(items: list[Item], part: Part) -> None:
    """Put the next part of an answer to its items."""
    last = items.pop() if items else None
    if isinstance(part, Arguments) and isinstance(last, FunctionCall):
        items.append(FunctionCall(last.name, last.arguments + part.text))
    elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
        items.append(Reasoning(last.text + part.text))
    elif isinstance(part, str) and isinstance(last, str):
        items.append(last + part)
    else:
        items += [] if last is None else [last]
        items.append(_begun(part))


def _begun(part: Part) -> Item:
    if isinstance(part, Begun):
        return FunctionCall(part.name, "")
    return part.text if isinstance(part, Arguments) else part


def begun_marker(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `markers`."""
    for length in range(min(len(text), max(map(len, markers)) - 1), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
