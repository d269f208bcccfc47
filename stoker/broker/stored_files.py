"""What the broker knows of files that clients of the gateway have stored: whose each is, how long it is kept, and of
which parts it consists. What they hold lies elsewhere (`stoker/files/contents.py`).

The id of a file stands among those of its place before its first part does, and goes after the last one: so what a
gateway left that died is found and deleted too.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError

from stoker.broker import keys
from stoker.broker.clock import seconds
from stoker.contract.presence import Notice

_ID = re.compile(r"file-[0-9a-f]{32}")
#: Records that are fetched at once.
STRIDE = 100


def is_id(name: str) -> bool:
    """Whether a file may be called so: an id is a part of keys and paths."""
    return _ID.fullmatch(name) is not None


class Span(Notice):
    """Parts that one writer has written one after the other, `WRITER-0` and so on."""

    writer: str
    parts: int


class FileRecord(Notice):
    """`owner`: the client key of those who see it. `created`, `expires`: seconds since the epoch, by the broker's
    clock. `place`: where its parts are."""

    id: str
    owner: str
    filename: str
    purpose: str
    created: float
    expires: int
    place: str
    bytes: int = 0
    spans: tuple[Span, ...] = ()

    def parts(self) -> list[str]:
        """The names of its parts, in order."""
        return [f"{span.writer}-{number}" for span in self.spans for number in range(span.parts)]


class StoredFiles:
    """Over an asyncio client of the broker."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    async def now(self) -> float:
        """The broker's clock."""
        return seconds(await self._redis.time())

    async def reserve(self, place: str, file_id: str, until: float) -> None:
        """From now on parts of this file may lie there; they go at `until`, by the broker's clock."""
        where = keys.file_contents(place)
        await self._redis.pipeline().zadd(where, {file_id: until}).expire(where, keys.FILES_TTL).execute()

    async def keep(self, record: FileRecord) -> None:
        """From now on its owner sees it, until it expires."""
        where, own = keys.file_contents(record.place), keys.files(record.owner)
        pipeline = self._redis.pipeline()
        pipeline.set(keys.file(record.id), record.model_dump_json(), exat=record.expires)
        # Not only when they are listed: a program may store files for years, and list none.
        pipeline.zremrangebyscore(own, "-inf", record.created - keys.FILES_TTL)
        pipeline.zadd(own, {record.id: record.created}).expire(own, keys.FILES_TTL)
        await pipeline.zadd(where, {record.id: record.expires}).expire(where, keys.FILES_TTL).execute()

    async def find(self, file_id: str, owner: str) -> FileRecord | None:
        """None for one of another owner too."""
        record = _parse(await self._redis.get(keys.file(file_id))) if is_id(file_id) else None
        return record if record is not None and record.owner == owner else None

    async def listed(self, owner: str, *, newest_first: bool = True) -> AsyncIterator[FileRecord]:
        """Every file of the owner, by its age."""
        own = keys.files(owner)
        await self._redis.zremrangebyscore(own, "-inf", await self.now() - keys.FILES_TTL)
        ids = await self._redis.zrange(own, 0, -1)
        ids = ids[::-1] if newest_first else ids
        for start in range(0, len(ids), STRIDE):
            stride = [name.decode(errors="replace") for name in ids[start : start + STRIDE]]
            found = [_parse(raw) for raw in await self._redis.mget([keys.file(name) for name in stride])]
            gone = [name for name, record in zip(stride, found, strict=True) if record is None]
            if gone:
                await self._redis.zrem(own, *gone)
            for record in found:
                if record is not None and record.owner == owner:
                    yield record

    async def forget(self, record: FileRecord) -> None:
        """Nobody sees it any more; its parts may go."""
        pipeline = self._redis.pipeline().delete(keys.file(record.id)).zrem(keys.files(record.owner), record.id)
        await pipeline.zadd(keys.file_contents(record.place), {record.id: 0}, xx=True).execute()

    async def over(self, place: str) -> list[str]:
        """Ids of files whose parts in this place may go."""
        found = await self._redis.zrangebyscore(keys.file_contents(place), "-inf", await self.now(), 0, STRIDE)
        return [name.decode(errors="replace") for name in found]

    async def gone(self, place: str, file_id: str) -> None:
        """Its parts are gone."""
        await self._redis.zrem(keys.file_contents(place), file_id)


def _parse(raw: bytes | None) -> FileRecord | None:
    """None for what another program wrote there."""
    try:
        return None if raw is None else FileRecord.model_validate_json(raw)
    except ValidationError:
        return None
