"""Training runs that clients of the gateway have asked for: what each asked, and how it ended.

The run itself is a job like any other. What is here outlives its record, its reports and its result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import ValidationError

from stoker.broker import keys
from stoker.broker.clock import seconds
from stoker.broker.stored_files import STRIDE
from stoker.contract.presence import Notice


class Ending(Notice):
    """`finished`: seconds since the epoch. `version`: the adapter's; `step`: the one whose weights it has. `code`,
    `message`: why it failed."""

    status: Literal["succeeded", "failed", "cancelled"]
    finished: int
    version: int | None = None
    step: int = 0
    loss: float | None = None
    held_out_loss: float | None = None
    tokens: int | None = None
    code: str = ""
    message: str = ""


class FineTune(Notice):
    """`id`: the job's. `owner`: the client key of those who see it. `created`: seconds since the epoch, by the
    broker's clock. `adapter`: what the run makes a version of."""

    id: str
    owner: str
    created: int
    model: str
    adapter: str
    training_file: str
    validation_file: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int
    multiplier: float
    seed: int
    #: Whether the adapter's bare name means the version that is made.
    promote: bool = True
    metadata: dict[str, str] | None = None
    ending: Ending | None = None


class FineTunes:
    """Over an asyncio client of the broker."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    async def now(self) -> int:
        """The broker's clock."""
        return int(seconds(await self._redis.time()))

    async def add(self, record: FineTune) -> FineTune | None:
        """The record of this id: this one, unless there was one before. None for one of another owner, and for what
        another program wrote there."""
        own = keys.fine_tunes(record.owner)
        pipeline = self._redis.pipeline()
        pipeline.set(keys.fine_tune(record.id), record.model_dump_json(), nx=True, ex=keys.FINE_TUNE_TTL)
        # Not only when they are listed: a program may ask for runs for years, and list none.
        pipeline.zremrangebyscore(own, "-inf", record.created - keys.FINE_TUNE_TTL)
        await pipeline.zadd(own, {record.id: record.created}, nx=True).expire(own, keys.FINE_TUNES_TTL).execute()
        return await self.find(record.id, record.owner)

    async def find(self, job_id: str, owner: str) -> FineTune | None:
        """None for one of another owner too."""
        return _parse(await self._redis.get(keys.fine_tune(job_id)), owner)

    async def listed(self, owner: str) -> AsyncIterator[FineTune]:
        """Every run of the owner, the newest first."""
        own = keys.fine_tunes(owner)
        await self._redis.zremrangebyscore(own, "-inf", await self.now() - keys.FINE_TUNE_TTL)
        ids = await self._redis.zrevrange(own, 0, -1)
        for start in range(0, len(ids), STRIDE):
            names = [keys.fine_tune(name.decode(errors="replace")) for name in ids[start : start + STRIDE]]
            for raw in await self._redis.mget(names):
                record = _parse(raw, owner)
                if record is not None:
                    yield record

    async def end(self, record: FineTune) -> None:
        """Keep how it ended for as long as it is known."""
        await self._redis.set(keys.fine_tune(record.id), record.model_dump_json(), xx=True, keepttl=True)

    async def forget(self, record: FineTune) -> None:
        """It was not sent."""
        own = keys.fine_tunes(record.owner)
        await self._redis.pipeline().delete(keys.fine_tune(record.id)).zrem(own, record.id).execute()

    async def reports(self, job_id: str, below: int | None, count: int) -> list[bytes]:
        """Reports of the run as they travelled, the newest first: at most `count`, with an index under `below`."""
        last = "+" if below is None else f"({keys.entry_id(below)}"
        rows = await self._redis.xrevrange(keys.stream(job_id), last, "-", count)
        return [fields.get(b"entry", b"") for _, fields in rows]


def _parse(raw: bytes | None, owner: str) -> FineTune | None:
    try:
        record = None if raw is None else FineTune.model_validate_json(raw)
    except ValidationError:
        return None
    return record if record is not None and record.owner == owner else None
