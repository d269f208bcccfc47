"""Free-form JSON in a request: tools, schemas, variables of a template. The fields' own limits do not reach into it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from stoker.contract.base import Message
from stoker.contract.shown import as_json, brief

#: Objects and lists that may lie in one another: what writes JSON and what reads it give up at depths of their own,
#: some with an error that names nothing.
MAX_DEPTH = 100
#: Values in all.
MAX_VALUES = 250_000
#: Whole numbers beyond 64 bits mean something else to each reader.
_LEAST, _MOST = -(2**63), 2**64 - 1


def check_json(name: str, value: Any, most: int) -> None:
    """Raises `ValueError` for what is no JSON, is nested too deep, or has more than `most` characters."""
    if value is None:
        return
    # First without recursion, and no further than the limits go: a list may hold itself, or one other a billion times.
    pending, seen = [(value, 1)], 0
    while pending:
        item, depth = pending.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ValueError(f"{name}: more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"{name}: objects and lists in one another, more than {MAX_DEPTH} deep; write it flatter")
        pending += [(child, depth + 1) for child in _children(name, item)]
    size = len(json.dumps(value, default=Message.model_dump, allow_nan=False))
    if size > most:
        raise ValueError(f"{name}: {size} characters of JSON; at most {most}")


def _children(name: str, item: Any) -> Iterable[Any]:
    if isinstance(item, Message):
        return item.model_dump().values()
    if isinstance(item, dict):
        if wrong := [key for key in item if not isinstance(key, str)]:
            raise ValueError(f"{name}: not JSON ({brief(wrong[0])} as a name; names are texts)")
        return [*item, *item.values()]
    if isinstance(item, list | tuple):
        return item
    _check_scalar(name, item)
    return ()


def _check_scalar(name: str, item: Any) -> None:
    if item is None or isinstance(item, bool):
        return
    if isinstance(item, str):
        if not _is_unicode(item):
            raise ValueError(f"{name}: not JSON ({as_json(item, 60)} holds half of a pair of surrogates)")
    elif isinstance(item, int):
        if not _LEAST <= item <= _MOST:
            raise ValueError(f"{name}: a whole number of more than 64 bits ({as_json(item, 60)})")
    elif not isinstance(item, float) or not math.isfinite(item):
        raise ValueError(f"{name}: not JSON ({as_json(item, 60)} is no value of it)")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
