"""What is sent again, and for how long."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from redis.exceptions import (
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from workers.services.retrying import FIRST_PAUSE, FORBIDDEN_LIMIT, LONGEST_PAUSE, REFUSAL_LIMIT, Retry


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now=100.0)


@pytest.mark.parametrize("error", [RedisConnectionError("x"), RedisTimeoutError("x"), BusyLoadingError("x")])
def test_a_broker_that_is_away_is_waited_for_however_long(clock: SimpleNamespace, error: RedisError) -> None:
    retry = Retry(clock=lambda: clock.now)
    for _ in range(1000):
        clock.now += 3600
        assert retry.pause(error) is not None


@pytest.mark.parametrize("error", [OutOfMemoryError("x"), ReadOnlyError("x"), ResponseError("MISCONF disk")])
def test_a_broker_that_refuses_is_asked_again_for_a_while(clock: SimpleNamespace, error: RedisError) -> None:
    retry = Retry(clock=lambda: clock.now)
    assert retry.pause(error) == FIRST_PAUSE
    clock.now += REFUSAL_LIMIT - 1
    assert retry.pause(error) is not None
    clock.now += 1
    assert retry.pause(error) is None


def test_what_is_forbidden_is_asked_again_for_a_few_seconds_and_not_without_end(clock: SimpleNamespace) -> None:
    retry = Retry(clock=lambda: clock.now)
    assert retry.pause(NoPermissionError("NOPERM")) == FIRST_PAUSE
    clock.now += FORBIDDEN_LIMIT - 1
    assert retry.pause(NoPermissionError("NOPERM")) is not None
    clock.now += 1
    assert retry.pause(NoPermissionError("NOPERM")) is None


def test_the_while_begins_anew_after_an_outage(clock: SimpleNamespace) -> None:
    retry = Retry(clock=lambda: clock.now)
    retry.pause(ReadOnlyError("x"))
    clock.now += REFUSAL_LIMIT
    assert retry.pause(RedisConnectionError("x")) is not None
    assert retry.pause(ReadOnlyError("x")) is not None


@pytest.mark.parametrize("answer", ["WRONGTYPE Operation", "ERR user_script:3: attempt", "NOPERM no"])
def test_any_other_answer_is_no_reason_to_ask_again(answer: str) -> None:
    assert Retry().pause(ResponseError(answer)) is None


def test_the_pauses_grow_and_stay_short(clock: SimpleNamespace) -> None:
    retry = Retry(clock=lambda: clock.now)
    pauses = [retry.pause(RedisConnectionError("x")) or 0.0 for _ in range(20)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


def test_what_is_forbidden_is_asked_for_no_longer_than_anything_else(clock: SimpleNamespace) -> None:
    retry = Retry(1.0, clock=lambda: clock.now)
    assert retry.pause(NoPermissionError("NOPERM")) is not None
    clock.now += 1
    assert retry.pause(NoPermissionError("NOPERM")) is None
