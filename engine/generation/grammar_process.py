"""The program that compiles a grammar first for `engine.generation.structured`, in a process with limits.

llguidance bounds what a step of a compiled grammar takes, and not what compiling takes. The bytes are the program's
tokens: what a grammar takes to compile does not depend on the vocabulary. `engine.platform.child` loads the program by
its path. It imports nothing of Stoker.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
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


_TOKENS = LLTokenizer(TokenizerWrapper(Bytes()))


def compiled(request: Mapping[str, Any]) -> dict[str, str]:
    """{"refused": llguidance's words, "" if it has none against the grammar}."""
    limits = LLParserLimits(**request["limits"])
    matcher = LLMatcher(_TOKENS, request["grammar"], log_level=0, limits=limits)
    return {"refused": matcher.get_error() if matcher.is_error() else ""}


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """The same, by a thread whose stack is small."""
    threading.stack_size(_STACK)
    found: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: found.append(compiled(request)))
    thread.start()
    thread.join()
    return found[0]
