"""The loop of a process with limits: a line of JSON in, a line of JSON out.

`engine.platform.limited` starts this file by its path. Neither it nor the program that it loads imports anything of
Stoker. A program is a file with a function `answer(request)`. The system sets the limits: an alarm that ends the
process in the middle of its work, and on Linux an address space.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

#: What the alarm counts: seconds that pass, or seconds that the process itself computes.
CLOCKS = {"passing": signal.ITIMER_REAL, "computing": signal.ITIMER_PROF}


def load(program: str) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """The function `answer` of the file `program`."""
    spec = spec_from_file_location("program", program)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{program} is no Python file")
    module = sys.modules["program"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    answer: Callable[[Mapping[str, Any]], dict[str, str]] = module.answer
    return answer


def limit_memory(size: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # macOS does not know the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main(program: str, clock: str, memory: str) -> None:
    limit_memory(int(memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the answer
    answer, alarm = load(program), CLOCKS[clock]
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(alarm, request["seconds"])
        reply = json.dumps(answer(request))
        signal.setitimer(alarm, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
