"""The broker's clock: leases and presences are dated by it, because the clocks of workers differ.

A worker whose clock is a lease ahead would take every message that another holds; one that is behind would take none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stoker.broker import keys
from stoker.broker.clock import seconds

#: KEYS: the leases. ARGV: `XX` for the tags alone that are there already, `CH` for all; then the tags.
_HOLD = """
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], ARGV[1], now, ARGV[i]) end
"""

#: KEYS: the leases, the messages that workers hold.
_HOLD_LOST = """
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
for _, tag in ipairs(redis.call('HKEYS', KEYS[2])) do redis.call('ZADD', KEYS[1], 'NX', now, tag) end
"""


def now(redis: Any) -> float:
    """Seconds since the epoch. For a blocking client."""
    return seconds(redis.time())


def hold(pipeline: Any, tags: Iterable[str], *, known: bool) -> None:
    """Say that the messages of these tags are held now; `known`: only of those that the index has. The script
    goes by its text, because a pipeline cannot send it again."""
    pipeline.eval(_HOLD, 1, keys.LEASES, "XX" if known else "CH", *tags)


def hold_lost(redis: Any) -> None:
    """Let the lease of each message that is held without one begin now: its own was lost with the key of the leases.
    Without any, the message would be held for ever, by nobody."""
    redis.eval(_HOLD_LOST, 2, keys.LEASES, keys.UNACKED)
