"""A given value, as a message shows it: short, and for every value there is."""

from __future__ import annotations

import json
import re
from typing import Any

#: Controls, escape sequences' beginnings among them, and those of direction (Unicode's UAX #9).
_MOVING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def brief(value: Any, most: int = 60) -> str:
    """The `repr` of `value`, cut to `most` characters; its type where it has none: an object may fail when it is looked
    at, and a list may be nested too deeply."""
    try:
        # The repr of a text is no shorter than the text: a few megabytes need not be made for sixty characters.
        text = repr(value[:most] if isinstance(value, str | bytes) and len(value) > most else value)
    except Exception:
        return f"an object of type {type(value).__name__} that cannot be shown"
    return cut(text, most)


def as_json(value: Any, most: int = 100) -> str:
    """`value` of a JSON file or request as JSON spells it, `true` and not `True`: on one line, cut to `most`
    characters. What is no JSON is shown as `brief` does."""
    try:
        text = json.dumps(value[:most] if isinstance(value, str) else value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return brief(value, most)
    text = cut(text, most)
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else json.dumps(letter)[1:-1]


def printable(text: str) -> str:
    """`text` on one line, as a terminal may have it: what another program wrote into the broker may move its cursor."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def harmless(text: str) -> str:
    """`text` of a model, as a terminal may have it: no letter of it moves the cursor, except by a new line or a tab, or
    turns the direction of writing."""
    return _MOVING.sub("\ufffd", text.replace("\r", ""))


def cut(words: object, most: int = 1000) -> str:
    """The first `most` characters at most of a text, or of what another program's library says of its input: it may
    repeat the whole of it."""
    text = str(words)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def trouble(error: OSError | ValueError) -> str:
    """Why a path cannot be used: the system's words, or those for what is no path at all."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
