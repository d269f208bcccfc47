"""The broker's clock: leases and presences are dated by it, because the clocks of workers differ.

A worker whose clock is a lease ahead would take every message that another holds; one that is behind would take none.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from stoker.broker import keys
from stoker.broker.clock import seconds

_NOW = """
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
"""

#: KEYS: the leases, the messages that workers hold. ARGV: the tag, its message.
_HOLD = f"{_NOW}redis.call('ZADD', KEYS[1], now, ARGV[1]) redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])"
_LET_GO = "redis.call('ZREM', KEYS[1], ARGV[1]) redis.call('HDEL', KEYS[2], ARGV[1])"

#: KEYS: the leases. ARGV: tags.
_RENEW = f"{_NOW}for i = 1, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now, ARGV[i]) end"

#: KEYS: the leases, the messages that workers hold.
_HOLD_LOST = f"""{_NOW}
for _, tag in ipairs(redis.call('HKEYS', KEYS[2])) do redis.call('ZADD', KEYS[1], 'NX', now, tag) end
"""


def now(redis: Any) -> float:
    """Seconds since the epoch. For a blocking client."""
    return seconds(redis.time())


def behind(redis: Any) -> float:
    """Seconds since the epoch by this machine's clock or the broker's, the one that is behind: what is deleted for its
    age cannot be brought back, and a clock that has leapt ahead makes everything old."""
    return min(time.time(), now(redis))


def hold(redis: Any, tag: str, message: str) -> None:
    """Say that this message is held from now on. One script, because MULTI and its replies take twice the worker's
    time. It goes by its text: kombu's clients put a prefix before the keys of one that goes by its hash."""
    redis.eval(_HOLD, 2, keys.LEASES, keys.UNACKED, tag, message)


def let_go(redis: Any, tag: str) -> None:
    """Say that nobody holds this message any more, and forget it."""
    redis.eval(_LET_GO, 2, keys.LEASES, keys.UNACKED, tag)


def renew(pipeline: Any, tags: Iterable[str]) -> None:
    """Say that those of these messages that are held are so now. The script goes by its text, because a pipeline cannot
    send it again."""
    pipeline.eval(_RENEW, 1, keys.LEASES, *tags)


def hold_lost(redis: Any) -> None:
    """Let the lease of each message that is held without one begin now: its own was lost with the key of the leases.
    Without any, the message would be held for ever, by nobody."""
    redis.eval(_HOLD_LOST, 2, keys.LEASES, keys.UNACKED)
