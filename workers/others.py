"""The other workers of the broker."""

from __future__ import annotations

from typing import Any

from stoker.broker import keys
from stoker.client.model_choice import parse_presences
from stoker.contract import Presence


def others(redis: Any, worker: str) -> list[Presence]:
    """What those that are alive say of themselves, except `worker`, this one. Raises `RedisError`."""
    names = [name.decode(errors="replace") for name in redis.zrange(keys.WORKERS, 0, -1)]
    raw = redis.mget([keys.worker(name) for name in names]) if names else []
    return [presence for presence in parse_presences(raw) if presence.worker != worker]
