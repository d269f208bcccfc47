"""The process that matches an adapter's regular expressions, for `engine.adapters.targets`: one may take without end.

It is started by its path and imports nothing of Stoker. The system's limits end it: seconds of its own computing, and
on Linux an address space.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from contextlib import suppress
from typing import Any


def matched(request: dict[str, Any]) -> dict[str, str]:
    """Each of the names that the whole pattern matches -> its group `idx`, or ""; {"": why} for a pattern that is
    none."""
    try:
        pattern = re.compile(request["pattern"])
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return {"": f"{type(error).__name__}: {error}"}
    match = pattern.match if request["beginning"] else pattern.fullmatch
    found = {name: match(name) for name in request["names"]}
    return {name: each.groupdict().get("idx", "") for name, each in found.items() if each is not None}


def limit_memory(size: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # macOS does not know the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    limit_memory(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the answer
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = json.dumps(matched(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
