"""A script of the broker, sent by its hash: its text goes over once, and again to a broker that has forgotten it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha1
from importlib import resources
from inspect import isawaitable
from typing import Any


def text(name: str) -> str:
    """The script `NAME.lua` of this folder."""
    return resources.files(__package__).joinpath(f"{name}.lua").read_text()


class LuaScript:
    """Call it with a blocking client for the reply, with an asyncio client for an awaitable of it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.hash = sha1(text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, redis: Any, names: list[str], arguments: list[Any]) -> Any:
        def in_full() -> Any:
            # EVAL runs the text and keeps it: one round trip less than SCRIPT LOAD, and no further permission.
            return redis.eval(self.text, len(names), *names, *arguments)

        # Here, and not above: a client is imported by programs that open no connection for a long time.
        from redis.exceptions import NoScriptError

        try:
            reply = redis.evalsha(self.hash, len(names), *names, *arguments)
        except NoScriptError:
            return in_full()
        return _later(reply, in_full) if isawaitable(reply) else reply


async def _later(reply: Awaitable[Any], in_full: Callable[[], Awaitable[Any]]) -> Any:
    from redis.exceptions import NoScriptError

    try:
        return await reply
    except NoScriptError:
        return await in_full()
