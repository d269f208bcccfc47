"""What the broker keeps for the gateway: files, batches, training runs, and who runs the batches of a place. Each test
looks at all that lies in the broker, with the time that it has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from stoker.broker import batches, keys
from stoker.broker.batches import Batch, Batches, BatchRecord, Lease
from stoker.broker.connection import connect_async
from stoker.broker.fine_tunes import Ending, FineTune, FineTunes
from stoker.broker.stored_files import STRIDE, FileRecord, Span, StoredFiles, is_id
from stoker.settings import Settings

HOUR = 3600
#: Seconds that a test may take.
SLACK = 30


@pytest.fixture
def asked(broker: Settings) -> Callable[[Callable[[Any], Awaitable[Any]]], Any]:
    """What a coroutine over an asyncio client of the broker returns."""

    @asynccontextmanager
    async def client() -> AsyncIterator[Any]:
        opened = connect_async(broker)
        try:
            yield opened
        finally:
            await opened.aclose()

    async def ask(question: Callable[[Any], Awaitable[Any]]) -> Any:
        async with client() as opened:
            return await question(opened)

    return lambda question: asyncio.run(ask(question))


def lives(redis: Any, key: str, seconds: float) -> bool:
    """Whether a key has that long to live, less what the test has taken."""
    return bool(seconds - SLACK <= redis.ttl(key) <= seconds)


def scores(redis: Any, key: str) -> dict[str, float]:
    return {name.decode(): score for name, score in redis.zrange(key, 0, -1, withscores=True)}


def now(redis: Any) -> int:
    return int(redis.time()[0])


async def all_of(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


# Files


def file_id(number: int) -> str:
    return f"file-{number:032x}"


def stored(redis: Any, number: int, owner: str = "alice", *, age: float = 0.0, left: int = HOUR) -> FileRecord:
    at = now(redis)
    what: dict[str, Any] = {"filename": "a.jsonl", "purpose": "batch", "place": "here", "bytes": 5}
    return FileRecord(id=file_id(number), owner=owner, created=at - age, expires=at + left, **what)


def test_a_files_id_stands_in_its_place_before_its_parts_do_and_until_they_may_go(redis: Any, asked: Any) -> None:
    until = now(redis) + 600
    asked(lambda client: StoredFiles(client).reserve("here", file_id(1), until))
    assert scores(redis, keys.file_contents("here")) == {file_id(1): until}
    assert lives(redis, keys.file_contents("here"), keys.FILES_TTL)
    assert redis.dbsize() == 1, "nobody sees it yet"
    record = stored(redis, 1)
    asked(lambda client: StoredFiles(client).keep(record))
    assert scores(redis, keys.file_contents("here")) == {file_id(1): record.expires}
    assert lives(redis, keys.file_contents("here"), keys.FILES_TTL)


def test_a_file_is_there_until_it_expires_and_its_lists_outlive_it(redis: Any, asked: Any) -> None:
    record = stored(redis, 1, age=5.0, left=200)
    asked(lambda client: StoredFiles(client).keep(record))
    assert redis.expiretime(keys.file(record.id)) == record.expires
    assert scores(redis, keys.files("alice")) == {record.id: record.created}
    assert lives(redis, keys.files("alice"), keys.FILES_TTL)
    assert asked(lambda client: StoredFiles(client).find(record.id, "alice")) == record
    assert asked(lambda client: StoredFiles(client).find(record.id, "bob")) is None


def test_what_is_no_id_of_a_file_is_not_looked_for(redis: Any, asked: Any) -> None:
    record = stored(redis, 1)
    for name in ("../etc", "file-1", f"{record.id}0", f"x{record.id}", record.id.upper(), ""):
        assert not is_id(name)
        redis.set(keys.file(name), record.model_dump_json(), ex=60)
        assert asked(lambda client, name=name: StoredFiles(client).find(name, "alice")) is None, name
        redis.delete(keys.file(name))


def test_every_file_of_a_client_is_listed_by_its_age_however_many_there_are(redis: Any, asked: Any) -> None:
    records = [stored(redis, number, age=1000.0 - number) for number in range(2 * STRIDE + 5)]
    theirs = stored(redis, 999, owner="bob")

    async def keep(client: Any) -> None:
        for record in (*records, theirs):
            await StoredFiles(client).keep(record)

    asked(keep)
    found = asked(lambda client: all_of(StoredFiles(client).listed("alice", newest_first=False)))
    assert found == records
    assert asked(lambda client: all_of(StoredFiles(client).listed("alice"))) == records[::-1]
    assert asked(lambda client: all_of(StoredFiles(client).listed("bob"))) == [theirs]


def test_ids_of_files_that_are_gone_leave_the_list_and_what_is_another_clients_is_not_shown(
    redis: Any, asked: Any
) -> None:
    record, gone, theirs = (stored(redis, number, owner) for number, owner in ((1, "alice"), (2, "alice"), (3, "bob")))
    old = now(redis) - keys.FILES_TTL

    async def keep(client: Any) -> None:
        for each in (record, gone, theirs):
            await StoredFiles(client).keep(each)

    asked(keep)
    redis.delete(keys.file(gone.id))
    redis.zadd(keys.files("alice"), {theirs.id: 1.0 + old + SLACK, file_id(4): old - 1, file_id(5): old + 2 * SLACK})
    redis.set(keys.file(file_id(4)), stored(redis, 4).model_dump_json(), ex=60)
    assert asked(lambda client: all_of(StoredFiles(client).listed("alice"))) == [record]
    assert scores(redis, keys.files("alice")).keys() == {record.id, theirs.id}, "those that are gone, and too old, left"


def test_lists_that_nobody_asks_for_do_not_grow_for_ever(redis: Any, asked: Any) -> None:
    at = now(redis)
    lists = {
        keys.files("alice"): keys.FILES_TTL,
        keys.fine_tunes("alice"): keys.FINE_TUNE_TTL,
        keys.batches("alice"): keys.BATCH_TTL,
    }
    for name, lifetime in lists.items():
        redis.zadd(name, {"old": at - lifetime - 60, "young": at - lifetime + 60})

    async def add(client: Any) -> None:
        await StoredFiles(client).keep(stored(redis, 1))
        await FineTunes(client).add(run(1, created=at))
        await Batches(client).create(batch(1, created=at))

    asked(add)
    kept = {name: scores(redis, name).keys() for name in lists}
    assert [found - {"young"} for found in kept.values()] == [{file_id(1)}, {"ft-1"}, {"batch_1"}]
    assert all("young" in found for found in kept.values()), "what may be there yet is left to the list itself"


def test_a_file_that_is_forgotten_is_seen_by_nobody_and_its_parts_may_go_at_once(redis: Any, asked: Any) -> None:
    record, other = stored(redis, 1), stored(redis, 2)

    async def keep_and_forget(client: Any) -> None:
        files = StoredFiles(client)
        await files.keep(record)
        await files.keep(other)
        await files.forget(record)
        await files.forget(stored(redis, 3))

    asked(keep_and_forget)
    assert not redis.exists(keys.file(record.id))
    assert scores(redis, keys.files("alice")).keys() == {other.id}
    assert scores(redis, keys.file_contents("here")) == {record.id: 0, other.id: other.expires}, "and no other is added"
    assert asked(lambda client: StoredFiles(client).over("here")) == [record.id]
    asked(lambda client: StoredFiles(client).gone("here", record.id))
    assert asked(lambda client: StoredFiles(client).over("here")) == []


def test_parts_may_go_from_the_moment_that_their_file_expires(redis: Any, asked: Any) -> None:
    at = now(redis)
    redis.zadd(keys.file_contents("here"), {file_id(1): at, file_id(2): at + 60, file_id(3): at - 60})
    redis.zadd(keys.file_contents("there"), {file_id(4): at})
    for place in ("here", "there"):
        redis.expire(keys.file_contents(place), 60)
    assert asked(lambda client: StoredFiles(client).over("here")) == [file_id(3), file_id(1)]


def test_the_parts_of_a_file_are_those_of_its_writers_in_their_order(redis: Any) -> None:
    record = stored(redis, 1).model_copy(update={"spans": (Span(writer="b", parts=2), Span(writer="a", parts=1))})
    assert record.parts() == ["b-0", "b-1", "a-0"]
    assert stored(redis, 1).parts() == []


# Batches


def batch(number: int, owner: str = "alice", *, created: float | None = None, **fields: Any) -> BatchRecord:
    what: dict[str, Any] = {"endpoint": "/v1/embeddings", "input_file": "f", "place": "here", "window": "24h"}
    what |= {"key": None, "models": None, "metadata": None, "expires": 10, "lifetime": 20}
    return BatchRecord(
        id=f"batch_{number}", owner=owner, created=number if created is None else created, **what | fields
    )


def create(*records: BatchRecord) -> Callable[[Any], Awaitable[None]]:
    async def run(client: Any) -> None:
        for record in records:
            await Batches(client).create(record)

    return run


def test_a_batch_is_known_to_its_owner_and_its_place_for_as_long_as_it_can_be_asked_for(redis: Any, asked: Any) -> None:
    record = batch(7)
    asked(create(record))
    assert scores(redis, keys.batches("alice")) == scores(redis, keys.open_batches("here")) == {"batch_7": 7.0}
    for key in (keys.batch("batch_7"), keys.batches("alice"), keys.open_batches("here")):
        assert lives(redis, key, keys.BATCH_TTL), key
    assert asked(lambda client: Batches(client).find("batch_7", "alice")) == Batch(record)
    assert asked(lambda client: Batches(client).find("batch_7", "bob")) is None
    assert asked(lambda client: Batches(client).find("batch_8", "alice")) is None


def test_batches_are_listed_by_their_age_and_what_is_gone_leaves_the_list(redis: Any, asked: Any) -> None:
    records = [batch(number) for number in range(STRIDE + 3)]
    asked(create(*records, batch(999, "bob")))
    redis.zadd(keys.batches("alice"), {"batch_999": 0.5, "batch_gone": 1.5})
    redis.set(keys.batch("batch_3"), "of another program", ex=60)
    expected = [record for record in records if record.id != "batch_3"]

    async def listed(client: Any, *, newest_first: bool = True) -> list[BatchRecord]:
        return [found.record for found in await all_of(Batches(client).listed("alice", newest_first=newest_first))]

    assert asked(lambda client: listed(client, newest_first=False)) == expected
    assert asked(listed) == expected[::-1]
    left = scores(redis, keys.batches("alice")).keys()
    assert left == {record.id for record in expected} | {"batch_999"}


def test_the_oldest_open_batches_of_a_place_are_looked_at_and_no_more_than_so_many(
    redis: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MOST_OPEN", 3)
    asked(create(*(batch(number, f"client-{number}") for number in (4, 2, 9, 1)), batch(0, place="there")))
    found = asked(lambda client: Batches(client).open("here"))
    assert [each.record.id for each in found] == ["batch_1", "batch_2", "batch_4"]


def test_a_cancel_counts_from_the_first_time_that_it_was_asked_for(redis: Any, asked: Any) -> None:
    asked(create(batch(1)))

    async def cancel_twice(client: Any) -> Batch | None:
        for at in (100, 200):
            await Batches(client).cancel("batch_1", at)
        return await Batches(client).find("batch_1", "alice")

    assert asked(cancel_twice) == Batch(batch(1), cancelled=100)
    assert lives(redis, keys.batch("batch_1"), keys.BATCH_TTL)


def test_only_who_runs_the_batches_of_a_place_writes_how_far_one_has_come(redis: Any, asked: Any) -> None:
    asked(create(batch(1), batch(2)))
    redis.set(keys.batch_runner("here"), "first", ex=keys.RUNNER_TTL)
    further = batch(1, status="in_progress", total=9)

    def write(record: BatchRecord, holder: str) -> Any:
        return asked(lambda client: Batches(client).write(record, holder))

    assert write(further, "first") is True
    assert write(batch(1, total=1), "second") is False
    assert asked(lambda client: Batches(client).find("batch_1", "alice")) == Batch(further)
    assert scores(redis, keys.open_batches("here")).keys() == {"batch_1", "batch_2"}
    assert lives(redis, keys.batch("batch_1"), keys.BATCH_TTL)
    assert write(batch(3), "first") is False, "one that is not known any more"
    assert not redis.exists(keys.batch("batch_3"))
    redis.delete(keys.batch_runner("here"))
    assert write(batch(1, total=1), "first") is False, "nobody runs them now"


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
def test_a_batch_that_has_ended_is_open_no_more_and_can_be_asked_for(redis: Any, asked: Any, status: Any) -> None:
    asked(create(batch(1), batch(2)))
    redis.set(keys.batch_runner("here"), "first", ex=keys.RUNNER_TTL)
    ended = batch(1, status=status)
    assert asked(lambda client: Batches(client).write(ended, "first"))
    assert scores(redis, keys.open_batches("here")).keys() == {"batch_2"}
    assert asked(lambda client: Batches(client).find("batch_1", "alice")) == Batch(ended)
    assert [each.record.id for each in asked(lambda client: all_of(Batches(client).listed("alice")))] == [
        "batch_2",
        "batch_1",
    ]


# Who runs the batches of a place


def test_one_at_a_time_runs_the_batches_of_a_place_and_says_so_before_its_time_is_over(redis: Any, asked: Any) -> None:
    name = keys.batch_runner("here")

    def does(holder: str, what: str) -> Any:
        return asked(lambda client: getattr(Lease(client, "here", holder), what)())

    assert does("first", "take") is True
    assert lives(redis, name, keys.RUNNER_TTL)
    assert does("second", "take") is False
    assert redis.get(name) == b"first"
    redis.expire(name, 3)
    assert does("second", "renew") is False
    assert redis.ttl(name) <= 3, "another's word does not renew it"
    assert does("first", "take") is True, "who has it takes it anew"
    assert redis.ttl(name) > 3
    redis.expire(name, 3)
    assert does("first", "renew") is True
    assert redis.ttl(name) > 3
    does("second", "give_back")
    assert redis.get(name) == b"first"
    does("first", "give_back")
    assert not redis.exists(name)
    assert does("first", "renew") is False, "another one may have had it meanwhile"
    assert not redis.exists(name)
    assert does("second", "take") is True


def test_the_runners_of_two_places_and_two_runners_of_one_are_told_apart(redis: Any, asked: Any) -> None:
    assert asked(lambda client: Lease(client, "here").take())
    assert not asked(lambda client: Lease(client, "here").take())
    assert asked(lambda client: Lease(client, "there").take())


# Training runs


def run(number: int, owner: str = "alice", *, created: int, **fields: Any) -> FineTune:
    what: dict[str, Any] = {"model": "m", "adapter": "a", "training_file": "f", "batch_size": 1, "multiplier": 1.0}
    return FineTune(id=f"ft-{number}", owner=owner, created=created, seed=1, **what | fields)


def test_a_run_that_is_asked_for_twice_is_the_first_one_and_another_clients_is_none(redis: Any, asked: Any) -> None:
    first = run(1, created=now(redis))
    assert asked(lambda client: FineTunes(client).add(first)) == first
    again = first.model_copy(update={"seed": 2, "created": first.created + 5})
    assert asked(lambda client: FineTunes(client).add(again)) == first
    assert scores(redis, keys.fine_tunes("alice")) == {"ft-1": first.created}
    assert lives(redis, keys.fine_tune("ft-1"), keys.FINE_TUNE_TTL)
    assert lives(redis, keys.fine_tunes("alice"), keys.FINE_TUNES_TTL)
    assert asked(lambda client: FineTunes(client).add(run(1, "bob", created=1))) is None
    assert asked(lambda client: FineTunes(client).find("ft-1", "alice")) == first


def test_how_a_run_ended_is_kept_for_as_long_as_the_run_is_known_and_of_no_other(redis: Any, asked: Any) -> None:
    record = run(1, created=now(redis))
    asked(lambda client: FineTunes(client).add(record))
    redis.expire(keys.fine_tune("ft-1"), 500)
    ended = record.model_copy(update={"ending": Ending(status="succeeded", finished=5, version=3)})
    asked(lambda client: FineTunes(client).end(ended))
    assert asked(lambda client: FineTunes(client).find("ft-1", "alice")) == ended
    assert lives(redis, keys.fine_tune("ft-1"), 500)
    asked(lambda client: FineTunes(client).end(run(2, created=1)))
    assert not redis.exists(keys.fine_tune("ft-2"))


def test_runs_are_listed_from_the_newest_on_and_those_that_are_over_leave_the_list(redis: Any, asked: Any) -> None:
    at = now(redis)
    records = [run(number, created=at - number) for number in range(STRIDE + 2)]

    async def add(client: Any) -> None:
        for record in (*records, run(999, "bob", created=at)):
            await FineTunes(client).add(record)

    asked(add)
    own = keys.fine_tunes("alice")
    redis.zadd(own, {"ft-999": at, "ft-old": at - keys.FINE_TUNE_TTL - 1, "ft-young": at - keys.FINE_TUNE_TTL + SLACK})
    assert asked(lambda client: all_of(FineTunes(client).listed("alice"))) == records
    assert scores(redis, own).keys() == {record.id for record in records} | {"ft-999", "ft-young"}
    asked(lambda client: FineTunes(client).forget(records[0]))
    assert asked(lambda client: all_of(FineTunes(client).listed("alice"))) == records[1:]
    assert "ft-0" not in scores(redis, own)
    assert not redis.exists(keys.fine_tune("ft-0"))


def test_the_newest_reports_of_a_run_come_first_and_those_below_one_follow_it(redis: Any, asked: Any) -> None:
    for index in range(5):
        redis.xadd(keys.stream("ft-1"), {"entry": str(index)}, id=keys.entry_id(index))
    redis.expire(keys.stream("ft-1"), 60)

    def reports(below: int | None, count: int) -> Any:
        return asked(lambda client: FineTunes(client).reports("ft-1", below, count))

    assert reports(None, 2) == [b"4", b"3"]
    assert reports(3, 2) == [b"2", b"1"]
    assert reports(1, 9) == [b"0"]
    assert reports(0, 9) == []
    assert asked(lambda client: FineTunes(client).now()) in range(now(redis) - SLACK, now(redis) + 1)
