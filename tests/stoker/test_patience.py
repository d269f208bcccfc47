"""How long a connection, and a caller with patience, wait for a broker; and what may pass by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from redis.exceptions import AuthenticationError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker.broker import connection, keys, letters
from stoker.broker.connection import SOCKET_TIMEOUT, Patience, connect, connect_async
from stoker.broker.trouble import passes
from stoker.errors import BrokerUnavailable
from stoker.settings import Settings

GONE = RedisConnectionError("gone")


@pytest.mark.parametrize(("patience", "seconds"), [(30.0, SOCKET_TIMEOUT), (2.0, 2.0), (0.0, 1.0)])
def test_no_try_is_longer_than_the_patience_nor_without_a_bound(patience: float, seconds: float) -> None:
    settings = Settings(url="redis://127.0.0.1:1/0", patience=patience)
    for client in (connect(settings), connect(settings, patient=True), connect_async(settings)):
        options = client.connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (seconds, seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_pauses_grow_up_to_a_second_until_the_patience_is_at_its_end(clock: list[float]) -> None:
    patience, pauses = Patience(Settings(patience=30)), []
    for clock[0] in (100.0, 101.0, 129.9):
        pauses.append(patience.spend(GONE))
    assert pauses == [pytest.approx(0.1), pytest.approx(0.35), 1.0]
    clock[0] = 130.0
    with pytest.raises(BrokerUnavailable, match="gone"):
        patience.spend(GONE)


def test_a_login_that_is_refused_is_not_tried_again(clock: list[float]) -> None:
    with pytest.raises(BrokerUnavailable, match="refuses the login"):
        Patience(Settings(patience=30)).spend(AuthenticationError("WRONGPASS"))


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'"), True),
        (ReadOnlyError("you can't write against a read only replica"), True),
        (ResponseError("MISCONF errors writing to the disk"), True),
        (GONE, True),
        (ResponseError("WRONGTYPE"), False),
        (ResponseError("unknown command"), False),
    ],
)
def test_what_may_pass_by_itself_is_distinguished_from_what_does_not(error: RedisError, may_pass: bool) -> None:
    assert passes(error) is may_pass


def test_a_worker_may_miss_a_few_presences_before_it_counts_as_gone() -> None:
    assert keys.PRESENCE_TTL >= 4 * keys.PRESENCE_EVERY


def test_a_letter_whose_name_or_text_is_none_is_shown_as_what_it_is() -> None:
    found = letters.parse({b"\xff\xfe": b"x", b"good": b"[" * 50_000, b"job": b'{"kind": 1}'})
    assert list(found) == [r"\xff\xfe", "good", "job"]
    assert {letter["kind"] for letter in found.values()} == {letters.MESSAGE}
    assert [letter["bytes"] for letter in found.values()] == [1, 50_000, 11]


def test_a_letter_keeps_the_beginning_of_a_message_and_its_length() -> None:
    kept = letters.shown(b"x" * (letters.KEPT + 1000))
    assert kept["bytes"] == letters.KEPT + 1000
    assert len(kept["message"]) == len(letters.shown(b"x" * letters.KEPT)["message"])
