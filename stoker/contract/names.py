"""What things may be called. Names become keys, folders and files, so each is checked by both sides, by this module:
where a caller gives it, where a worker reads it from a message, a record or a registry, and where it becomes a path."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from stoker.contract.shown import brief
from stoker.errors import InvalidRequest


class Rule(Enum):
    """A pattern for the whole of a name, and the same in words. None of them lets a path through."""

    #: Models, adapters, keys of clients.
    NAME = (r"[a-z0-9][a-z0-9._-]{0,63}", "1 to 64 of a-z, 0-9, dot, dash and underscore, the first a letter or digit")
    #: Jobs, and so training runs.
    JOB_ID = (
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
        "1 to 128 letters, digits, dots, dashes and underscores, the first a letter or digit",
    )
    #: Versions of an adapter.
    VERSION = (r"[1-9][0-9]{0,8}", "1 to 999999999")

    def __init__(self, pattern: str, allowed: str) -> None:
        self.pattern, self.allowed = pattern, allowed


def follows(rule: Rule, given: object) -> bool:
    return isinstance(given, str) and re.fullmatch(rule.pattern, given) is not None


def checked(rule: Rule, what: str, given: Any) -> str:
    """`given`, if it follows the rule. Raises `InvalidRequest` that names `what` otherwise."""
    if not follows(rule, given):
        raise InvalidRequest(f"{what}: {brief(given, 160)} given; allowed: {rule.allowed}.")
    return str(given)
