"""Keys for the gateway: who may ask it, for how much, and whose jobs theirs are.

The broker has the SHA-256 of each key alone: a key is 256 random bits, of which nothing can be found out by trying.
What is counted for a key is a bucket that fills up again evenly within a minute. A request is counted when it comes,
and refused where the bucket is empty; its tokens are counted when they are known, so that what runs at once may take
more than is left, and further requests wait for as long as that takes.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stoker.broker import keys
from stoker.broker.ledger.call import Call
from stoker.contract.names import Rule, checked
from stoker.contract.presence import Notice
from stoker.errors import InvalidRequest

#: What a key begins with, so that people and scanners of secrets know it when they see it.
BEGINNING = "sk-stoker-"
#: The most that may be allowed a minute.
MOST = 1_000_000_000
#: Characters of the digest that a key is called by.
ID = 12


class ApiKey(Notice):
    """What the broker knows of a key. `client`: the client key of its jobs. `requests`, `tokens`: allowed a minute;
    None: any number. `models`: bases that it may use; None: all."""

    client: str
    created: float
    requests: int | None = None
    tokens: int | None = None
    models: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Admission:
    """`keys`: how many there are at all. `key`: None for one that is unknown. `wait`: seconds after which there is room
    again; 0: now. `short_of`: what there is none left of."""

    keys: int
    key: ApiKey | None = None
    wait: float = 0.0
    short_of: str = ""


_BUCKET = (
    f"local RATE_TTL = {keys.RATE_TTL}"
    """
-- What is left of `limit` a minute, in a bucket that fills up evenly.
local function left(key, name, limit, now)
  local found = redis.call('HMGET', key, name, name .. ':at')
  local level, at = tonumber(found[1]), tonumber(found[2])
  if not level or not at then return limit end
  if now < at then
    -- The clock was set back: what waits is given back from now on, and not once it has come there again.
    redis.call('HSET', key, name .. ':at', string.format('%.6f', now))
    at = now
  end
  return math.min(limit, level + (now - at) * limit / 60)
end

local function keep(key, name, level, now)
  redis.call('HSET', key, name, string.format('%.6f', level), name .. ':at', string.format('%.6f', now))
  redis.call('EXPIRE', key, RATE_TTL)
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
"""
)

#: KEYS: the keys, the key's bucket. ARGV: the key's digest. Returns how many keys there are, what is known of this one,
#: the seconds to wait, and for what.
ADMIT = (
    _BUCKET
    + """
local raw = redis.call('HGET', KEYS[1], ARGV[1])
local count = redis.call('HLEN', KEYS[1])
if not raw then return {count} end
local readable, known = pcall(cjson.decode, raw)
if not readable or type(known) ~= 'table' then return {count} end
local now = clock()
local tokens = tonumber(known.tokens)
if tokens then
  local level = left(KEYS[2], 'tokens', tokens, now)
  if level <= 0 then return {count, raw, string.format('%.3f', (1 - level) * 60 / tokens), 'tokens'} end
end
local requests = tonumber(known.requests)
if requests then
  local level = left(KEYS[2], 'requests', requests, now)
  if level < 1 then return {count, raw, string.format('%.3f', (1 - level) * 60 / requests), 'requests'} end
  keep(KEYS[2], 'requests', level - 1, now)
end
return {count, raw, '0', ''}
"""
)

#: KEYS: the key's bucket. ARGV: tokens a minute, tokens that were taken.
SPEND = (
    _BUCKET
    + """
local now, limit = clock(), tonumber(ARGV[1])
local level = left(KEYS[1], 'tokens', limit, now) - tonumber(ARGV[2])
keep(KEYS[1], 'tokens', math.max(level, -limit * RATE_TTL / 60), now)
return 1
"""
)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def admission(secret: str) -> Call[Admission]:
    """Count one request that came with this key."""
    found = digest(secret)
    names = (keys.API_KEYS, keys.rate(found[:ID]))
    return Call(lambda redis: redis.eval(ADMIT, 2, *names, found), _admission)


def _admission(reply: Any) -> Admission:
    count, *known = reply
    if not known:
        return Admission(int(count))
    raw, wait, short_of = known
    return Admission(int(count), _parse(raw), float(wait), short_of.decode())


def spending(secret: str, limit: int, tokens: int) -> Call[None]:
    """Count tokens that were taken."""
    bucket = keys.rate(digest(secret)[:ID])
    return Call(lambda redis: redis.eval(SPEND, 1, bucket, limit, tokens), lambda reply: None)


def create(redis: Any, key: ApiKey) -> str:
    """A new key, which is nowhere else from now on. Raises `InvalidRequest`. For a blocking client."""
    checked(Rule.NAME, "client", key.client)
    for what in ("requests", "tokens"):
        limit = getattr(key, what)
        if limit is not None and not 1 <= limit <= MOST:
            raise InvalidRequest(f"{what}: {limit} given; allowed: 1 to {MOST}.")
    for model in key.models or ():
        checked(Rule.NAME, "model", model)
    if not math.isfinite(key.created):
        raise InvalidRequest(f"created: {key.created} given; expected seconds since the epoch.")
    secret = BEGINNING + secrets.token_urlsafe(32)
    redis.hset(keys.API_KEYS, digest(secret), key.model_dump_json())
    return secret


def listed(redis: Any) -> dict[str, ApiKey]:
    """What each key is called → what is known of it, the oldest first. For a blocking client."""
    found = {name.decode(errors="replace")[:ID]: _parse(raw) for name, raw in redis.hgetall(keys.API_KEYS).items()}
    known = {name: key for name, key in found.items() if key is not None}
    return dict(sorted(known.items(), key=lambda item: item[1].created))


def revoke(redis: Any, name: str) -> None:
    """Let a key count no more, from the next request on. Raises `InvalidRequest`. For a blocking client."""
    whole = [found for found in redis.hkeys(keys.API_KEYS) if found.decode(errors="replace")[:ID] == name]
    if not whole:
        raise InvalidRequest(f"key: {name[:80]!r} given; there is none of that name. `stoker keys list` shows them.")
    redis.hdel(keys.API_KEYS, *whole)


def _parse(raw: bytes) -> ApiKey | None:
    """None for what another program wrote there."""
    try:
        return ApiKey.model_validate_json(raw)
    except ValidationError:
        return None
