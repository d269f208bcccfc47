"""Writing something of another type over a key, as a program that is none of Stoker's might."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TYPES = ("string", "list", "hash", "zset", "set", "stream")


def write(redis: Any, key: str, kind: str, value: bytes, lives: int | None) -> None:
    """Something of the type `kind` at `key`, in place of what is there. `lives`: seconds; None: it stays."""
    writes: dict[str, Callable[[Any], Any]] = {
        "string": lambda pipeline: pipeline.set(key, value),
        "list": lambda pipeline: pipeline.rpush(key, value),
        "hash": lambda pipeline: pipeline.hset(key, value or b"a", value),
        "zset": lambda pipeline: pipeline.zadd(key, {value: 1.0}),
        "set": lambda pipeline: pipeline.sadd(key, value),
        "stream": lambda pipeline: pipeline.xadd(key, {value or b"a": value}),
    }
    pipeline = redis.pipeline()
    pipeline.delete(key)
    writes[kind](pipeline)
    if lives is not None:
        pipeline.expire(key, lives)
    pipeline.execute()
