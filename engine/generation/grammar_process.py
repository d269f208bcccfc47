"""The process that compiles a grammar first, for `engine.generation.structured`: it may take without end.

It is started by its path and imports nothing of Stoker. llguidance bounds what a step of a compiled grammar takes, and
not what compiling takes; so the system's limits end the process: seconds of its own computing, and on Linux an address
space. The bytes are its tokens: what a grammar takes to compile does not hang on the vocabulary.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

#: A grammar that is nested too deep for this stack is not given to the worker, whose threads have eight times as much.
_STACK = 1 << 20


class Bytes:
    """What llguidance asks of a tokenizer."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def compiled(tokens: LLTokenizer, request: dict[str, Any]) -> dict[str, str]:
    """{"refused": llguidance's words, "" if it has none against the grammar}."""
    limits = LLParserLimits(**request["limits"])
    matcher = LLMatcher(tokens, request["grammar"], log_level=0, limits=limits)
    return {"refused": matcher.get_error() if matcher.is_error() else ""}


def limit_memory(size: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # macOS does not know the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def answer(tokens: LLTokenizer, request: dict[str, Any]) -> dict[str, str]:
    """The same, by a thread whose stack is small."""
    found: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: found.append(compiled(tokens, request)))
    thread.start()
    thread.join()
    return found[0]


def main() -> None:
    limit_memory(int(sys.argv[1]))
    threading.stack_size(_STACK)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the answer
    tokens = LLTokenizer(TokenizerWrapper(Bytes()))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = json.dumps(answer(tokens, request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
