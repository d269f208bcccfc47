"""Whole answers as JSON, written piece by piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

#: Pieces between two moments at which others have their turn.
AT_ONCE = 16
_dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


async def written(answer: dict[str, object]) -> bytes:
    """The alternatives of a long answer's tokens take seconds: no stream of this gateway waits for more than a few."""
    parts = list[str]()
    for count, part in enumerate(_parts(answer)):
        parts.append(part)
        if count % AT_ONCE == 0:
            await asyncio.sleep(0)
    return "".join(parts).encode("utf-8", "backslashreplace")


def _parts(value: object) -> Iterator[str]:
    """An iterator is written as a list, and asked for an item when that is written."""
    if isinstance(value, dict):
        for number, (name, inner) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_dump(name)}:"
            yield from _parts(inner)
        yield "}" if value else "{}"
    elif isinstance(value, Iterator) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        yield "["
        for number, item in enumerate(value):
            yield "," if number else ""
            yield from _parts(item) if isinstance(value, list) else (_dump(item),)
        yield "]"
    else:
        yield _dump(value)
