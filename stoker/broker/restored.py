"""Putting back what a backup has of the broker's durable keys: what is missing, over nothing that is there.

A hash holds things with names of their own (versions of an adapter, pinned prefixes, keys of the gateway, rules), and
each of them is missing or there by itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, TypeAlias

from stoker.broker import api_keys, keys, prefixes, registry

#: Of a set, a hash, or a string.
Value: TypeAlias = list[bytes] | dict[bytes, bytes] | bytes


class Restored:
    """The keys of one backup on their way into a broker. All calls raise redis-py's errors."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        #: Ids of the gateway's keys that were put back, as `stoker keys list` shows them.
        self.api_keys: list[str] = []
        #: Key of an adapter → what the backup knows of it.
        self._adapters: dict[str, Mapping[bytes, bytes]] = {}

    def put_back(self, name: str, value: Value) -> bool:
        """Whether something of the key was missing. An adapter's has to come before its artifacts."""
        kind = keys.kind_of(name)
        if kind is None or self._held(name) not in ("none", kind.type):
            return False
        if isinstance(value, list):
            return bool(value) and bool(self._redis.sadd(name, *value) > 0)
        if isinstance(value, dict):
            return self._hash(kind.name, name, value)
        if kind.name == "artifact" and self.is_another(*name.split(":")[-3:]):
            return False
        return bool(self._redis.set(name, value, nx=True))

    def is_another(self, model: str, name: str, version: str) -> bool:
        """Whether this broker knows another version under the number that the backup's has: then the files of that one
        would be taken for its."""
        key = keys.adapter(model, name)
        if keys.kind_of(key) is None or self._held(key) != "hash":
            return False
        field = registry.VERSION + version
        known: bytes | None = self._redis.hget(key, field)
        return known is not None and known != self._adapters.get(key, {}).get(field.encode())

    def _hash(self, kind: str, name: str, value: Mapping[bytes, bytes]) -> bool:
        if kind == "adapter":
            self._adapters[name] = value
            return bool(registry.restore(self._redis, name, value) > 0)
        given = [(field, content) for field, content in value.items() if field != prefixes.CHANGED.encode()]
        added = [field for field, content in given if self._redis.hsetnx(name, field, content)]
        if added and kind == "prefixes":
            # Workers read it only when this is another.
            self._redis.hset(name, prefixes.CHANGED, uuid.uuid4().hex)
        if kind == "api_keys":
            self.api_keys += [field[: api_keys.ID].decode(errors="replace") for field in added]
        return bool(added)

    def _held(self, name: str) -> str:
        return str(self._redis.type(name).decode())
