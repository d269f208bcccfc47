"""A script of the broker, called as a function of a library, or sent by its hash: its text goes over once, and again to
a broker that has forgotten it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha1
from importlib import resources
from inspect import isawaitable
from typing import Any, TypeAlias

#: Commands for a client of either kind, one after the other: each is answered by what it returned, or by its error.
Steps: TypeAlias = Generator[Callable[[], Any], Any, Any]

#: How the names of our libraries begin.
PREFIX = "stoker_"
#: Libraries of Stoker that a broker may keep: one a version, those that nobody uses any more too.
MOST_LIBRARIES = 8


def text(name: str) -> str:
    """The script `NAME.lua` of this folder."""
    return resources.files(__package__).joinpath(f"{name}.lua").read_text("utf-8")


def _hash(text: str) -> str:
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Body:
    """A transition's own text, which follows that of the `parts` it needs. `makes_room`: whether a broker whose memory
    is full has to run it, because less is kept afterwards. `LuaScript` needs no such word: there a command that takes
    memory is refused until the script has deleted something."""

    text: str
    parts: tuple[str, ...]
    makes_room: bool = False

    def script(self) -> str:
        return "".join(map(text, self.parts)) + self.text


class Library:
    """Transitions as functions, which a broker keeps with its data. Its name is the hash of its text, and theirs begin
    with it: versions of Stoker that share a broker call their own."""

    def __init__(self, parts: Iterable[str], bodies: Mapping[str, Body]) -> None:
        shared = "\n".join(parts)
        self.name = PREFIX + _hash(f"{shared}{bodies}")[:16]
        functions = [_registered(self.of(name), body) for name, body in bodies.items()]
        self.text = f"#!lua name={self.name}\n{shared}\n{''.join(functions)}"

    def of(self, name: str) -> str:
        """The function's name in the broker."""
        return f"{self.name}_{name}"

    def offer(self, redis: Any) -> None:
        """Load it by a blocking client before it is called, so that clients, who load nothing, find it from their first
        job on. To a broker that takes no library scripts are sent, as at a call."""
        from redis.exceptions import ResponseError

        try:
            _run(self.load(redis))
        except ResponseError:
            redis.functions.refuse()

    def load(self, redis: Any) -> Steps:
        """Where many versions have left theirs, all others go: one that is used is loaded again by its workers."""
        from redis.exceptions import ResponseError

        kept = yield lambda: redis.function_list(f"{PREFIX}*")
        if len(kept) >= MOST_LIBRARIES:
            for name in filter(None, map(_library, kept)):
                yield partial(redis.function_delete, name)
        try:
            yield lambda: redis.function_load(self.text)
        except ResponseError as error:
            # Another worker was first.
            if "already exists" not in str(error):
                raise


def _registered(name: str, body: Body) -> str:
    flags = "'allow-oom'" if body.makes_room else ""
    callback = f"function(KEYS, ARGV)\n{body.text}\nend"
    return f"redis.register_function{{function_name='{name}', flags={{{flags}}}, callback={callback}}}\n"


def _library(listed: Any) -> bytes | None:
    """The name of a library in the answer of `FUNCTION LIST`: a list of names and values, or a mapping."""
    fields = listed if isinstance(listed, dict) else dict(zip(listed[::2], listed[1::2], strict=False))
    name: bytes | None = fields.get(b"library_name")
    return name


class LuaScript:
    """Call it with a blocking client for the reply, with an asyncio client for an awaitable of it. `function`: the same
    in `library`, for a client of `connection.py` whose broker has it."""

    def __init__(self, text: str, library: Library | None = None, function: str = "") -> None:
        self.text, self.hash = text, _hash(text)
        self._library, self._function = library, library.of(function) if library else ""

    def __call__(self, redis: Any, names: list[str], arguments: list[Any]) -> Any:
        return _run(self._steps(redis, [len(names), *names, *arguments]))

    def _steps(self, redis: Any, arguments: list[Any]) -> Steps:
        # Here, and not above: a client is imported by programs that open no connection for a long time.
        from redis.exceptions import NoScriptError, ResponseError

        functions = getattr(redis, "functions", None)
        if self._library and functions and functions.called():
            try:
                return (yield from self._call(redis, self._library, arguments))
            except ResponseError as error:
                if not _gone(error):
                    raise
                functions.refuse()
        try:
            return (yield lambda: redis.evalsha(self.hash, *arguments))
        except NoScriptError:
            # EVAL runs the text and keeps it: one round trip less than SCRIPT LOAD, and no further permission.
            return (yield lambda: redis.eval(self.text, *arguments))

    def _call(self, redis: Any, library: Library, arguments: list[Any]) -> Steps:
        from redis.exceptions import ResponseError

        try:
            return (yield lambda: redis.fcall(self._function, *arguments))
        except ResponseError as error:
            if not (redis.functions.loads and _NOT_FOUND in str(error)):
                raise
        try:
            yield from library.load(redis)
        except ResponseError as error:
            raise ResponseError(f"{_NOT_FOUND}: {error}") from error
        return (yield lambda: redis.fcall(self._function, *arguments))


_NOT_FOUND = "Function not found"
#: What a broker answers that cannot run the function, before it runs anything of it.
_UNKNOWN, _FORBIDDEN = "unknown command", "'fcall' command"


def _gone(error: Exception) -> bool:
    return any(said in str(error) for said in (_NOT_FOUND, _UNKNOWN, _FORBIDDEN))


def _run(steps: Steps) -> Any:
    """By a blocking client; the first awaitable that a client answers with shows that it is the other kind."""
    from redis.exceptions import RedisError

    try:
        send = next(steps)
        while True:
            try:
                reply = send()
            except RedisError as error:
                send = steps.throw(error)
                continue
            if isawaitable(reply):
                return _run_later(steps, reply)
            send = steps.send(reply)
    except StopIteration as end:
        return end.value


async def _run_later(steps: Steps, reply: Awaitable[Any]) -> Any:
    from redis.exceptions import RedisError

    try:
        while True:
            try:
                value = await reply
            except RedisError as error:
                reply = steps.throw(error)()
            else:
                reply = steps.send(value)()
    except StopIteration as end:
        return end.value
