"""Values of the wrong type, size or encoding, and documents with such a value somewhere in them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

TEXTS = (
    "", " ", "\x00", "a\x00b", "\ud800", "\udfff x", "é" * 7, "ab " * 40, "x" * 5000, "../../etc/passwd", "%s%n", "NaN",
    "1e999", "null", "-1", "\u202e", "\ufeff", "</s>", "<|im_end|>", "stoker:unacked", "ab@1", "@", "😀", "\r\n",
    "[" * 50,
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**31,
    2**31 - 1,
    2**32,
    2**53 + 1,
    2**63,
    2**70,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    1e-320,
)
UNREAL = (float("nan"), float("inf"), float("-inf"))
#: Bytes that are JSON's, Redis', UTF-8's and safetensors' own, and those that are nobody's.
BYTES = b'{}[]",:0179aeE+-\\\x00\xff\xfe\x80\xed\xa0 \n\r\t'


class CallersOwn(Exception):
    """What an object of the caller's raises: it is the caller's own, and reaches it as it is."""


class Unreadable:
    """An object that fails when it is looked at."""

    def __repr__(self) -> str:
        return "Unreadable()"

    def __iter__(self) -> Any:
        raise CallersOwn

    def __len__(self) -> int:
        raise CallersOwn

    def __str__(self) -> str:
        raise CallersOwn


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def json_value(chance: random.Random, depth: int = 2) -> Any:
    """Any value that JSON has, and that is probably not the one expected."""
    kinds: list[Callable[[], Any]] = [
        lambda: chance.choice(TEXTS),
        lambda: chance.choice(NUMBERS),
        lambda: chance.choice((None, True, False)),
        lambda: [json_value(chance, depth - 1) for _ in range(chance.randrange(4) if depth else 0)],
        lambda: {_name(chance): json_value(chance, depth - 1) for _ in range(chance.randrange(4) if depth else 0)},
        lambda: deep(chance.choice((20, 900, 3000))) if depth == 2 else chance.choice(NUMBERS),
    ]  # fmt: skip
    return chance.choices(kinds, (4, 4, 2, 2, 2, 1))[0]()


def value(chance: random.Random) -> Any:
    """Any value of Python: what a caller may put where an option is expected."""
    kinds: list[Callable[[], Any]] = [
        lambda: json_value(chance),
        lambda: some_bytes(chance, 20),
        lambda: chance.choice(UNREAL),
        lambda: {1, 2, "x"},
        lambda: {1: b"", None: object()},
        lambda: [b"", object(), 1j],
        lambda: chance.choice((object(), Unreadable(), int, len, 1j, PurePath("x"), range(5), bytearray(b"x"), ...)),
        lambda: (item for item in ("a", 1, None)),
    ]
    return chance.choices(kinds, (8, 2, 1, 1, 1, 1, 2, 1))[0]()


def _name(chance: random.Random) -> str:
    return chance.choice(("a", "type", "", "role", "content", "$ref", "é", "x" * 300, "name"))


def some_bytes(chance: random.Random, most: int) -> bytes:
    size = chance.randrange(most)
    return chance.randbytes(size) if chance.random() < 0.5 else bytes(chance.choice(BYTES) for _ in range(size))


def spoiled_bytes(chance: random.Random, whole: bytes) -> bytes:
    """`whole` with a few bytes changed, cut short, put in or taken out."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        act = chance.randrange(5)
        if act == 0:
            del data[at:]
        elif act == 1:
            data[at:at] = some_bytes(chance, 12)
        elif act == 2:
            del data[at : at + chance.randint(1, 16)]
        else:
            data[at : at + 1] = bytes([chance.choice(BYTES)])
    return bytes(data)


def spoiled(chance: random.Random, document: Any, odd: Callable[[random.Random], Any] = json_value) -> Any:
    """A copy of a document of objects and lists, with one or two of its parts replaced, left out or added."""
    found = _copied(document)
    for _ in range(chance.choice((1, 1, 2))):
        holder, part = chance.choice(_places(found) or [(None, None)])
        if holder is None:
            return odd(chance)
        act = chance.randrange(6)
        if act == 0:
            del holder[part]
        elif act == 1 and isinstance(holder, dict):
            holder[_name(chance)] = odd(chance)
        else:
            holder[part] = odd(chance)
    return found


def _copied(document: Any, depth: int = 8) -> Any:
    """A copy as deep as its parts are replaced."""
    if isinstance(document, dict) and depth:
        return {name: _copied(part, depth - 1) for name, part in document.items()}
    return [_copied(part, depth - 1) for part in document] if isinstance(document, list) and depth else document


def _places(document: Any, depth: int = 8) -> list[tuple[Any, Any]]:
    """(object or list, key or index) of every part of a document, as far as it is not too deep."""
    if not isinstance(document, dict | list) or not depth:
        return []
    parts: Sequence[Any] = list(document) if isinstance(document, dict) else range(len(document))
    below = [place for part in parts for place in _places(document[part], depth - 1)]
    return [(document, part) for part in parts] + below


def shown(given: Any, most: int = 300) -> str:
    """A value as a report names it."""
    try:
        text = ascii(given)
    except Exception as error:
        text = f"a {type(given).__name__} that cannot be shown ({type(error).__name__})"
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
