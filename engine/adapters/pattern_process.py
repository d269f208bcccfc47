"""The program that matches an adapter's regular expressions for `engine.adapters.targets`, in a process with limits:
matching one may never end.

`engine.platform.child` loads it by its path. It imports nothing of Stoker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """Each of the names that the whole pattern matches -> its group `idx`, or ""; {"": why} for a pattern that is
    none."""
    try:
        pattern = re.compile(request["pattern"])
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return {"": f"{type(error).__name__}: {error}"}
    match = pattern.match if request["beginning"] else pattern.fullmatch
    found = {name: match(name) for name in request["names"]}
    return {name: each.groupdict().get("idx", "") for name, each in found.items() if each is not None}
