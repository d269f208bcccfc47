"""Clients of redis-py whose errors name the key that holds another type than a command needs: a broker's answer does
not say which it was, and a script has twenty."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from stoker.broker import keys
from stoker.broker.functions import Functions

_REFUSED = "WRONGTYPE"
#: What Redis before 7.0 puts before the error that a command of a script met, and the classes of such errors.
_IN_SCRIPT = re.compile(r"Error running script \(call to f_[0-9a-f]{40}\): (?:@user_script: ?\d+: )+-?")
_CLASSES = {"OOM": OutOfMemoryError, "READONLY": ReadOnlyError}


def _own(error: ResponseError) -> ResponseError:
    """The command's own error, as newer brokers say it."""
    wrapped = _IN_SCRIPT.match(str(error))
    if wrapped is None:
        return error
    said = str(error)[wrapped.end() :]
    return _CLASSES.get(said.partition(" ")[0], ResponseError)(said)


def is_wrong_type(error: BaseException) -> bool:
    return isinstance(error, ResponseError) and str(error).startswith(_REFUSED)


def _names(command: Sequence[Any]) -> list[str]:
    """The keys of a command: those of a script, else its first argument."""
    name, *arguments = command
    if str(name).upper() in ("EVAL", "EVALSHA", "FCALL"):
        return [str(key) for key in arguments[2 : 2 + int(arguments[1])]]
    return [str(key) for key in arguments[:1]]


def _named(names: Sequence[str], found: Sequence[bytes]) -> ResponseError:
    """The broker's refusal of a command with these keys, which are of the types that were `found`."""
    wrong = []
    for key, is_now in zip(names, map(bytes.decode, found), strict=True):
        kind = keys.kind_of(key)
        if is_now != "none" and kind is not None and kind.type not in (is_now, keys.ANY):
            wrong.append(f"the key {key} is a {is_now}, not a {kind.type}")
    what = "; ".join(wrong) or f"one of {', '.join(names)} was of another type, and is not any more"
    return ResponseError(f"{_REFUSED}: {what}")


class Redis(redis.Redis):
    functions: Functions

    def execute_command(self, *args: Any, **named: Any) -> Any:
        try:
            return super().execute_command(*args, **named)  # type: ignore[no-untyped-call]
        except ResponseError as caught:
            if not is_wrong_type(error := _own(caught)):
                raise error from None
            names = _names(args)
            found = [super(Redis, self).execute_command("TYPE", name) for name in names]  # type: ignore[no-untyped-call]
            raise _named(names, found) from None


class AsyncRedis(redis.asyncio.Redis):
    functions: Functions

    async def execute_command(self, *args: Any, **named: Any) -> Any:
        try:
            return await super().execute_command(*args, **named)  # type: ignore[no-untyped-call]
        except ResponseError as caught:
            if not is_wrong_type(error := _own(caught)):
                raise error from None
            names = _names(args)
            found = [await super(AsyncRedis, self).execute_command("TYPE", name) for name in names]  # type: ignore[no-untyped-call]
            raise _named(names, found) from None
