"""What a process says of a prompt that its memory does not hold, and another one's may."""

from __future__ import annotations

from stoker.errors import InvalidRequest


class BeyondMemory(InvalidRequest):
    """`tokens`: of the prompt, in which the process that raises it does not go on. Never leaves the worker."""

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens
