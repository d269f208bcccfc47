"""What the broker knows of batches: what was asked, how far each has come, and which gateway runs those of a place.

One gateway at a time runs the batches of a place (`Lease`), and only it writes how far they are: what another one
writes that was overtaken counts for nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic import Field, ValidationError

from stoker.broker import keys
from stoker.broker.stored_files import STRIDE, FileRecord
from stoker.contract.presence import Notice

Status: TypeAlias = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelled"]
#: A batch that has one of these has ended.
ENDED = ("completed", "failed", "expired", "cancelled")


class Trouble(Notice):
    """Why a batch failed as a whole."""

    code: str
    message: str


class BatchRecord(Notice):
    """Times are seconds since the epoch, by the broker's clock. `owner`: the client key of those who see it; `key`:
    that of its jobs, None where there are no keys. `models`: bases that it may use; None: all. `lifetime`: seconds that
    its files are kept."""

    id: str
    owner: str
    key: str | None
    models: tuple[str, ...] | None
    endpoint: str
    input_file: str
    place: str
    window: str
    metadata: dict[str, str] | None
    created: float
    expires: int
    lifetime: int
    status: Status = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    #: What its lines have become so far; each is kept for its owner when the batch has ended.
    output: FileRecord | None = None
    errors: FileRecord | None = None
    trouble: tuple[Trouble, ...] = ()
    #: When it came to each status; `cancelling` too.
    since: dict[str, int] = Field(default_factory=dict)

    @property
    def done(self) -> int:
        """Lines whose answer or error is written for good."""
        return self.completed + self.failed

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class Batch:
    """`cancelled`: when its client asked for its end; 0: it did not."""

    record: BatchRecord
    cancelled: int = 0


#: KEYS: the lease, the batch, the open batches of its place. ARGV: the holder, the record, its id, whether it ended.
_WRITE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
redis.call('HSET', KEYS[2], 'record', ARGV[2])
if ARGV[4] == '1' then redis.call('ZREM', KEYS[3], ARGV[3]) end
return 1
"""
#: KEYS: the lease. ARGV: the holder, the seconds that it is held from now on; 0: it is given back.
_HOLD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then redis.call('DEL', KEYS[1]) else redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return 1
"""


class Batches:
    """Over an asyncio client of the broker."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    async def create(self, record: BatchRecord) -> None:
        name, own, todo = keys.batch(record.id), keys.batches(record.owner), keys.open_batches(record.place)
        # Not only when they are listed: a program may make batches for years, and list none.
        old = await self._redis.zrangebyscore(own, "-inf", record.created - keys.BATCH_TTL, 0, STRIDE)
        pipeline = self._redis.pipeline().hset(name, "record", record.model_dump_json()).expire(name, keys.BATCH_TTL)
        if old:
            pipeline.zrem(own, *old)
        pipeline.zadd(own, {record.id: record.created}).expire(own, keys.BATCH_TTL)
        await pipeline.zadd(todo, {record.id: record.created}).expire(todo, keys.BATCH_TTL).execute()

    async def find(self, batch_id: str, owner: str) -> Batch | None:
        """None for one of another owner too."""
        batch = _parse(*await self._redis.hmget(keys.batch(batch_id), "record", "cancel"))
        return batch if batch is not None and batch.record.owner == owner else None

    async def listed(self, owner: str, *, newest_first: bool = True) -> AsyncIterator[Batch]:
        """Every batch of the owner, by its age."""
        async for batch in self._of(keys.batches(owner), newest_first=newest_first):
            if batch.record.owner == owner:
                yield batch

    async def open(self, place: str) -> list[Batch]:
        """The oldest of those of a place that have not ended."""
        found = list[Batch]()
        async for batch in self._of(keys.open_batches(place), newest_first=False):
            found.append(batch)
            if len(found) == MOST_OPEN:
                break
        return found

    async def _of(self, name: str, *, newest_first: bool) -> AsyncIterator[Batch]:
        ids = await self._redis.zrange(name, 0, -1)
        ids = ids[::-1] if newest_first else ids
        for start in range(0, len(ids), STRIDE):
            pipeline = self._redis.pipeline(transaction=False)
            for batch_id in ids[start : start + STRIDE]:
                pipeline.hmget(keys.batch(batch_id.decode(errors="replace")), "record", "cancel")
            replies = await pipeline.execute(raise_on_error=False)
            for batch_id, reply in zip(ids[start : start + STRIDE], replies, strict=True):
                batch = _parse(*reply) if isinstance(reply, list) else None
                if batch is None:
                    await self._redis.zrem(name, batch_id)
                else:
                    yield batch

    async def cancel(self, batch_id: str, now: int) -> None:
        """Ask its runner to end it. Asked again, it counts from the first time."""
        await self._redis.hsetnx(keys.batch(batch_id), "cancel", now)

    async def write(self, record: BatchRecord, holder: str) -> bool:
        """How far it has come. False for a holder that was overtaken."""
        names = (keys.batch_runner(record.place), keys.batch(record.id), keys.open_batches(record.place))
        ended = "1" if record.ended else "0"
        written = await self._redis.eval(_WRITE, 3, *names, holder, record.model_dump_json(), record.id, ended)
        return bool(written)


#: Batches of a place that are looked at.
MOST_OPEN = 1000


@dataclass
class Lease:
    """The right to run the batches of a place. A holder that says nothing for a while has lost it."""

    redis: Any
    place: str
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def take(self) -> bool:
        """Whether it is held now."""
        name = keys.batch_runner(self.place)
        return bool(await self.redis.set(name, self.holder, nx=True, ex=keys.RUNNER_TTL)) or await self.renew()

    async def renew(self) -> bool:
        """False: another one has it, or may have it."""
        return bool(await self.redis.eval(_HOLD, 1, keys.batch_runner(self.place), self.holder, keys.RUNNER_TTL))

    async def give_back(self) -> None:
        await self.redis.eval(_HOLD, 1, keys.batch_runner(self.place), self.holder, 0)


def _parse(raw: bytes | None, cancelled: bytes | None) -> Batch | None:
    """None for what another program wrote there."""
    try:
        record = None if raw is None else BatchRecord.model_validate_json(raw)
        return None if record is None else Batch(record, int(cancelled or 0))
    except (ValidationError, ValueError):
        return None
