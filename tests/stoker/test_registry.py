"""The registry of adapters on a real broker: every change whole, every number given once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from stoker.broker import keys, ledger, registry
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.broker.registry import MOST_HISTORY, AdapterEntry
from stoker.contract import bundle
from stoker.errors import InvalidRequest, UnknownAdapter
from stoker.settings import Settings

pytestmark = pytest.mark.integration


@pytest.fixture
def broker_client(broker: Settings) -> Iterator[redis.Redis]:
    client = connect(broker)
    yield client
    client.close()


def entry(client: Any) -> AdapterEntry:
    return registry.parse("m", "style", client.hgetall(keys.adapter("m", "style")))


def add(client: Any, version: int, *, promote: bool = True) -> None:
    registry.register(client, "m", "style", version, {"rank": 8, "loss": 1.5}, promote=promote)


def change(client: Any, verb: registry.Verb, version: int | None = None) -> Any:
    done = registry.change(client, "m", verb, "style", version)
    return done if done is None else done.decode()


def test_versions_are_in_the_order_of_their_numbers(broker_client: Any) -> None:
    for version in (10, 2, 9):
        add(broker_client, version)
    assert list(entry(broker_client).versions) == [2, 9, 10]


def test_versions_serve_as_they_come_except_where_one_is_chosen(broker_client: Any) -> None:
    add(broker_client, 1)
    add(broker_client, 2)
    add(broker_client, 3, promote=False)
    found = entry(broker_client)
    assert (found.serving, found.history, list(found.versions)) == (2, (1,), [1, 2, 3])
    assert found.versions[3]["rank"] == 8
    assert registry.names(broker_client.smembers(keys.adapters("m"))) == ["style"]
    add(broker_client, 2)
    change(broker_client, "promote", 2)
    assert entry(broker_client).history == (1,), "said again, nothing changes"


@pytest.mark.parametrize(("verb", "left"), [("rollback", 1), ("deactivate", None)])
def test_a_version_that_is_registered_again_takes_back_no_choice_of_a_person(
    broker_client: Any, verb: registry.Verb, left: int | None
) -> None:
    add(broker_client, 1)
    add(broker_client, 2)
    change(broker_client, verb)
    add(broker_client, 2)
    assert entry(broker_client).serving == left


def test_promote_and_rollback_go_forth_and_back(broker_client: Any) -> None:
    for version in (1, 2, 3):
        add(broker_client, version)
    assert change(broker_client, "promote", 1) == "1"
    assert change(broker_client, "rollback") == "3"
    assert change(broker_client, "rollback") == "2"
    assert change(broker_client, "rollback") == "1"
    assert change(broker_client, "rollback") is None
    assert change(broker_client, "promote", 7) is None
    assert entry(broker_client).serving == 1


def test_of_the_versions_that_served_the_last_thousand_are_remembered(broker_client: Any) -> None:
    add(broker_client, 1)
    add(broker_client, 2)
    longest = json.dumps(["1", "2"] * (MOST_HISTORY // 2))
    broker_client.hset(keys.adapter("m", "style"), "history", longest)
    assert change(broker_client, "promote", 1) == "1"
    found = entry(broker_client).history
    assert (len(found), found[0], found[-2:]) == (MOST_HISTORY, 2, (2, 2))
    assert change(broker_client, "rollback") == "2"


def test_what_was_unloaded_is_skipped_and_never_comes_back(broker_client: Any) -> None:
    for version in (1, 2, 3):
        add(broker_client, version)
        broker_client.set(keys.artifact("m", "style", version), b"files")
    assert change(broker_client, "unload", 3) is None, "it serves"
    assert change(broker_client, "unload", 2) == "3"
    assert not broker_client.exists(keys.artifact("m", "style", 2))
    assert change(broker_client, "rollback") == "1"
    assert list(entry(broker_client).versions) == [1, 3]
    assert number(broker_client, "job") == 4


def test_a_deactivated_adapter_serves_by_version_alone(broker_client: Any) -> None:
    add(broker_client, 1)
    assert change(broker_client, "deactivate") == ""
    found = entry(broker_client)
    assert found.version(1) == 1
    with pytest.raises(UnknownAdapter, match=r"none of its versions \(1\) serves"):
        found.version(None)
    with pytest.raises(UnknownAdapter, match="'style@2' given; the versions of style: 1"):
        found.version(2)
    assert change(broker_client, "rollback") == "1"


def number(client: Any, job: str, floor: int = 1) -> int:
    client.hset(keys.job(job), Field.KIND, "train")
    client.expire(keys.job(job), 60)
    return int(ledger.allocate(client, "m", "style", job, floor))


def test_a_job_gets_one_number_however_often_it_asks(broker_client: Any) -> None:
    assert [number(broker_client, job) for job in ("a", "b", "a", "b")] == [1, 2, 1, 2]
    assert number(broker_client, "c", floor=9) == 9, "a disk has versions up to 8"


@pytest.mark.parametrize(
    ("verb", "version", "why"),
    [
        ("rollback", None, "nothing to go back to"),
        ("unload", 1, "serves now"),
        ("promote", 4, "the versions of style: 1"),
    ],
)
def test_what_cannot_be_done_says_why(verb: registry.Verb, version: int | None, why: str) -> None:
    found = AdapterEntry("m", "style", 1, (), {1: {}})
    assert why in str(registry.explain(found, verb, version))


def test_a_bundle_is_read_as_it_was_packed_and_nothing_else_is() -> None:
    files = {"adapter_config.json": b"{}", "adapters.safetensors": b"\x00\x01"}
    assert bundle.unpack(bundle.pack(files), "x") == files
    with pytest.raises(InvalidRequest, match=r"'\.\./evil' is no file of an adapter"):
        bundle.unpack(bundle.pack({"../evil": b"x"}), "x")
    for data in (b"", b"12345678", json.dumps(files, default=str).encode()):
        with pytest.raises(InvalidRequest, match="x: no bundle"):
            bundle.unpack(data, "x")


@pytest.mark.parametrize(
    ("said", "found"),
    [("/clients/my adapter", "/clients/my adapter"), ("a" * 2000, "a" * 1024), ("two\nlines", "x"), (None, "x"),
     ("not text: \udcff", "not text: ?")],
)  # fmt: skip
def test_a_bundle_says_where_it_comes_from_if_that_can_be_written_in_a_line(said: str | None, found: str) -> None:
    assert bundle.source(bundle.pack({"adapter_config.json": b"{}"}, said), "x") == found


@pytest.mark.parametrize("data", [b"", b"12345678", (2**40).to_bytes(8, "little") + b"{", b"\x02" + b"\0" * 7 + b"[]"])
def test_a_damaged_bundle_says_nothing_of_where_it_comes_from(data: bytes) -> None:
    assert bundle.source(data, "x") == "x"


def test_a_record_that_a_number_is_written_into_after_it_expired_expires_again(broker_client: Any) -> None:
    assert int(ledger.allocate(broker_client, "m", "style", "gone", 1)) == 1
    assert 0 < broker_client.ttl(keys.job("gone")) <= keys.PENDING_TTL
    broker_client.expire(keys.job("gone"), 60)
    broker_client.hset(keys.job("gone"), Field.KIND, "train")
    broker_client.hdel(keys.job("gone"), Field.VERSION)
    assert int(ledger.allocate(broker_client, "m", "style", "gone", 1)) == 2
    assert 0 < broker_client.ttl(keys.job("gone")) <= 60, "one that has an expiry keeps it"


@pytest.mark.parametrize(("last", "following"), [(9, 10), (99_999_998, 99_999_999), (999_999_998, 999_999_999)])
def test_the_number_behind_one_of_up_to_nine_digits_is_the_next(broker_client: Any, last: int, following: int) -> None:
    broker_client.hset(keys.adapter("m", "style"), "next", last)
    assert number(broker_client, "a") == following
    assert int(broker_client.hget(keys.adapter("m", "style"), "next")) == following


def test_rollback_goes_past_the_version_that_serves_again(broker_client: Any) -> None:
    for version in (1, 2):
        add(broker_client, version)
    for version in (1, 2, 1):
        change(broker_client, "promote", version)
    change(broker_client, "unload", 2)
    assert entry(broker_client).history == (1, 2, 1, 2)
    assert change(broker_client, "rollback") is None, "before 1 served 2, which is gone, and 1 itself"


def test_a_name_without_a_version_means_the_one_that_serves_and_not_the_newest() -> None:
    found = AdapterEntry("m", "style", 1, (), {1: {}, 2: {}})
    assert (found.version(None), found.version(2)) == (1, 2)


def test_a_record_that_a_version_is_pinned_in_after_it_expired_expires_again(broker_client: Any) -> None:
    assert [ledger.pin(broker_client, "late", version) for version in (3, 4)] == ["3", "3"], "the first one stays"
    assert 0 < broker_client.ttl(keys.job("late")) <= keys.PENDING_TTL
    broker_client.expire(keys.job("late"), 60)
    assert ledger.pin(broker_client, "late", 3) == "3"
    assert broker_client.ttl(keys.job("late")) <= 60, "one that has an expiry keeps it"


@pytest.mark.parametrize(("token", "ended", "taken"), [("one", "", True), ("two", "", False), ("one", "1", False)])
def test_who_does_not_own_the_job_any_more_or_has_ended_it_registers_nothing(
    broker_client: Any, token: str, ended: str, *, taken: bool
) -> None:
    broker_client.hset(keys.job("job"), mapping={Field.TOKEN: "one", **({Field.ENDED: ended} if ended else {})})
    broker_client.expire(keys.job("job"), 60)
    owner = registry.Owner("job", token)
    assert registry.keep(broker_client, "m", "style", 1, b"files", owner) == taken
    assert bool(registry.register(broker_client, "m", "style", 1, {}, promote=True, owner=owner)) == taken
    assert broker_client.exists(keys.adapter("m", "style"), keys.adapters("m")) == 2 * taken
    assert broker_client.exists(keys.artifact("m", "style", 1)) == taken
