"""The ledger's transitions as functions of the broker: loaded where they are missing, scripts where there are none."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

from stoker.broker import functions, keys, ledger, policy
from stoker.broker.connection import connect, connect_async
from stoker.broker.functions import Functions
from stoker.broker.ledger.record import Field
from stoker.broker.ledger.script import MOST_LIBRARIES
from stoker.broker.ledger.transitions import LIBRARY, TRANSITIONS, made
from stoker.contract.kinds import READY
from stoker.settings import Settings
from tests.stoker.clocked import quick_broker
from tests.stoker.test_ledger import QUEUE, submit

PIN = ([keys.job("pinned")], [3, 60])


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    """A worker's client."""
    with closing(connect(broker, loads_functions=True)) as client:
        client.function_flush()
        client.script_flush()
        client.config_resetstat()
        yield client
        client.function_flush()


def calls(redis: Any, command: str) -> int:
    """How often the broker ran it, and did not refuse it."""
    counted = redis.info("commandstats").get(f"cmdstat_{command}", {"calls": 0, "failed_calls": 0})
    return int(counted["calls"] - counted["failed_calls"])


def libraries(redis: Any) -> set[str]:
    return {dict(zip(row[::2], row[1::2], strict=True))[b"library_name"].decode() for row in redis.function_list()}


def start(redis: Any, job: str) -> None:
    assert ledger.claim(redis, job, QUEUE, "one", "tag", "w").state == "run"


def end(redis: Any, job: str) -> bool:
    return ledger.complete(redis, job, QUEUE, "one", ledger.success(job, {}))


def test_a_worker_loads_the_functions_once_and_again_when_the_broker_has_lost_them(redis: Any) -> None:
    for number in range(1, 4):
        assert [submit(redis, f"{number}-{job}") for job in range(3)] == ["new"] * 3
        assert (calls(redis, "fcall"), calls(redis, "function|load")) == (3 * number, number)
        redis.function_flush()
    assert calls(redis, "evalsha") == calls(redis, "eval") == 0


def test_a_client_loads_nothing_and_calls_what_a_worker_has_loaded(
    redis: Any, broker: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(connect(broker)) as client:
        assert [submit(client, str(number)) for number in range(2)] == ["new"] * 2
        assert (calls(redis, "fcall"), calls(redis, "eval"), calls(redis, "evalsha")) == (0, 1, 1)
        assert libraries(redis) == set()
        assert submit(redis, "workers") == "new"
        assert submit(client, "soon") == "new"
        assert calls(redis, "fcall") == 1, "it asks again after some seconds"
        monkeypatch.setattr(functions, "AGAIN", 0.0)
        assert submit(client, "later") == "new"
        assert calls(redis, "fcall") == 2


def test_a_client_calls_functions_from_its_first_job_on_where_a_worker_has_started(
    redis: Any, broker: Settings
) -> None:
    LIBRARY.offer(redis)
    LIBRARY.offer(redis)
    with closing(connect(broker)) as client:
        assert submit(client) == "new"
    assert (calls(redis, "fcall"), calls(redis, "eval"), calls(redis, "evalsha")) == (1, 0, 0)


def test_a_broker_that_takes_no_library_is_sent_scripts_and_the_worker_starts(tmp_path: Path) -> None:
    with quick_broker(tmp_path, "--rename-command", "FUNCTION", "") as client:
        client.functions = Functions(loads=True)
        LIBRARY.offer(client)
        assert not client.functions.called()
        assert submit(client) == "new"


def test_an_asyncio_client_does_the_same(redis: Any, broker: Settings) -> None:
    async def pinned(*, loads: bool) -> tuple[bytes, bool]:
        client = connect_async(broker)
        client.functions = Functions(loads=loads)
        try:
            return await TRANSITIONS.pin(client, *PIN), client.functions.called()
        finally:
            await client.aclose()

    assert asyncio.run(pinned(loads=False)) == (b"3", False)
    assert asyncio.run(pinned(loads=True)) == (b"3", True)
    assert asyncio.run(pinned(loads=False)) == (b"3", True)
    assert (calls(redis, "eval"), calls(redis, "fcall"), calls(redis, "function|load")) == (1, 2, 1)


def test_a_broker_without_functions_gets_scripts_and_does_the_same(tmp_path: Path) -> None:
    with quick_broker(tmp_path, "--rename-command", "FCALL", "", "--rename-command", "FUNCTION", "") as client:
        client.functions = Functions(loads=True)
        assert submit(client) == "new"
        start(client, "job")
        assert end(client, "job")
        assert not client.functions.called()
        assert calls(client, "eval") + calls(client, "evalsha") == 3


class Refusing:
    """A broker that refuses a function and runs scripts."""

    def __init__(self, error: Exception, on_load: Exception | None = None) -> None:
        self.functions, self._error, self._on_load, self.sent = Functions(loads=True), error, on_load, list[str]()

    def fcall(self, *arguments: Any) -> Any:
        self.sent.append("function")
        raise self._error

    def function_list(self, *arguments: Any) -> list[Any]:
        return []

    def function_load(self, *arguments: Any) -> None:
        self.sent.append("load")
        if self._on_load:
            raise self._on_load

    def evalsha(self, *arguments: Any) -> bytes:
        self.sent.append("script")
        return b"3"


MISSING = ResponseError("Function not found")


@pytest.mark.parametrize(
    ("broker_", "first"),
    [
        (Refusing(NoPermissionError("User w has no permissions to run the 'fcall' command")), ["function"]),
        (Refusing(ResponseError("unknown command 'FCALL', with args beginning with: 'x'")), ["function"]),
        (Refusing(MISSING, NoPermissionError("no permissions to run 'function|load'")), ["function", "load"]),
        (Refusing(MISSING, OutOfMemoryError("command not allowed")), ["function", "load"]),
        # Loaded, and gone again before it is called.
        (Refusing(MISSING), ["function", "load", "function"]),
    ],
)
def test_a_broker_that_refuses_the_function_gets_the_script_and_is_asked_again_after_some_seconds(
    broker_: Refusing, first: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert [TRANSITIONS.pin(broker_, *PIN) for _ in range(2)] == [b"3"] * 2
    assert broker_.sent == [*first, "script", "script"]
    now[0] += functions.AGAIN
    broker_.sent.clear()
    TRANSITIONS.pin(broker_, *PIN)
    assert broker_.sent == [*first, "script"]


def test_an_error_of_the_function_itself_is_the_callers_and_no_script_runs() -> None:
    refusing = Refusing(ResponseError("WRONGTYPE Operation against a key"))
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        TRANSITIONS.pin(refusing, *PIN)
    assert refusing.sent == ["function"]
    assert refusing.functions.called()


def test_two_versions_on_one_broker_call_each_its_own_and_leave_the_others(redis: Any) -> None:
    other, transitions = made(lambda text: text.replace("-- What every script shares", "-- What scripts share"))
    assert other.name != LIBRARY.name
    for _ in range(3):
        assert TRANSITIONS.pin(redis, *PIN) == transitions.pin(redis, *PIN) == b"3"
    assert libraries(redis) == {LIBRARY.name, other.name}
    assert (calls(redis, "function|load"), calls(redis, "evalsha")) == (2, 0)


def test_libraries_of_former_versions_do_not_pile_up(redis: Any) -> None:
    text = "#!lua name={0}\nredis.register_function('{0}_x', function() return 1 end)"
    mine = [f"stoker_{number:016x}" for number in range(MOST_LIBRARIES)]
    for name in (*mine, "of_another_program"):
        redis.function_load(text.format(name))
    assert TRANSITIONS.pin(redis, *PIN) == b"3"
    assert libraries(redis) == {LIBRARY.name, "of_another_program"}


def test_what_one_call_of_a_function_knew_another_does_not(redis: Any) -> None:
    lives = []
    for number, seconds in enumerate((None, 600, 120, None)):
        if seconds:
            policy.decide(redis, "result_seconds", seconds)
        else:
            redis.delete(keys.POLICY)
        submit(redis, str(number))
        start(redis, str(number))
        assert end(redis, str(number))
        lives.append(redis.ttl(keys.result(str(number))))
    assert lives == [keys.RESULT_TTL, 600, 120, keys.RESULT_TTL]
    assert calls(redis, "evalsha") == 0


def test_how_fast_jobs_age_is_asked_anew_at_each_call_of_a_function(redis: Any) -> None:
    """An old job is taken before a better one once the policy lets it age, and not before."""
    taken = []
    for seconds in (10_000, 10, 10_000):
        policy.decide(redis, "ageing", seconds)
        for name, priority in (("old", 5), ("new", 4)):
            submit(redis, name, priority=priority)
        redis.delete(keys.ready(QUEUE), keys.dispatched(QUEUE))
        redis.hset(keys.job("old"), Field.SUBMITTED, redis.time()[0] - 100)
        for name, priority in (("old", 5), ("new", 4)):
            redis.zadd(keys.backlog(QUEUE, priority), {name: 1})
            redis.expire(keys.backlog(QUEUE, priority), 60)
        submit(redis, "last", priority=9)
        messages = redis.lrange(keys.ready(QUEUE), 0, -1)
        taken.append(json.loads(messages[-1])["headers"]["id"])
        for name in ("old", "new", "last"):
            ledger.cancel(redis, name, QUEUE)
            redis.delete(keys.job(name), keys.result(name))
    assert taken == ["new", "old", "new"]
    assert calls(redis, "evalsha") == 0


def test_where_jobs_wait_is_asked_anew_at_each_call_of_a_function(redis: Any, broker: Settings) -> None:
    """Others may have sent them by scripts, which know nothing of what the functions knew."""
    submit(redis, "first")
    start(redis, "first")
    assert end(redis, "first")
    redis.delete(keys.ready(QUEUE))
    with closing(connect(broker)) as client:
        client.functions.refuse()
        for number in range(READY + 1):
            submit(client, str(number), priority=7)
    redis.rpop(keys.ready(QUEUE))
    start(redis, "0")
    assert redis.llen(keys.ready(QUEUE)) == READY, "the one that waited has come"


@pytest.mark.parametrize("as_functions", [True, False], ids=["functions", "scripts"])
def test_a_broker_whose_memory_is_full_takes_no_job_and_lets_jobs_end(redis: Any, *, as_functions: bool) -> None:
    if not as_functions:
        redis.functions.refuse()
    for job in ("runs", "waits"):
        assert submit(redis, job) == "new"
    start(redis, "runs")
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            submit(redis, "more")
        assert ledger.cancel(redis, "waits", QUEUE) == "cancelled"
        assert end(redis, "runs")
    finally:
        redis.config_set("maxmemory", 0)
    assert not redis.exists(keys.job("more"), keys.open_jobs(QUEUE), keys.sizes(QUEUE))
    assert submit(redis, "more") == "new"
    assert (calls(redis, "evalsha") == 0) == as_functions


def test_every_transition_is_a_function_of_the_library() -> None:
    for name in vars(TRANSITIONS):
        assert LIBRARY.text.count(f"function_name='{LIBRARY.of(name)}'") == 1


def test_what_makes_room_runs_also_where_memory_is_full(redis: Any) -> None:
    """Else a broker that is full would stay so."""
    for job in ("released", "given-up", "refused", "lost"):
        submit(redis, job)
    for job in ("released", "given-up"):
        start(redis, job)
    redis.delete(keys.ready(QUEUE))
    redis.config_set("maxmemory", 1)
    try:
        assert ledger.release(redis, "released", QUEUE, "one")
        assert ledger.dead_letter(redis, "given-up", QUEUE, "one", "w", "a full disk").history
        assert end(redis, "given-up")
        assert ledger.refuse(redis, "refused", QUEUE, ledger.revoked("refused"))
        assert sorted(ledger.recover(redis, QUEUE, 0)) == ["lost", "released"]
    finally:
        redis.config_set("maxmemory", 0)


class Loading:
    """A broker to which another worker loads the library at the same time."""

    def __init__(self, error: str) -> None:
        self.functions, self._error = Functions(loads=True), error

    def function_list(self, *arguments: Any) -> list[Any]:
        return []

    def function_load(self, *arguments: Any) -> None:
        raise ResponseError(self._error)


@pytest.mark.parametrize(("error", "called"), [("Library 'stoker_1' already exists", True), ("no such command", False)])
def test_a_library_that_another_worker_loaded_meanwhile_is_used(error: str, *, called: bool) -> None:
    loading = Loading(error)
    LIBRARY.offer(loading)
    assert loading.functions.called() == called
