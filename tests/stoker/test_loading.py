"""A broker that reads its data back is waited for, within the patience, and what is waited for is said."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from typer.testing import CliRunner

from stoker import AsyncClient, Client
from stoker.broker import keys
from stoker.broker.asking import caller_waits, own_patience
from stoker.broker.connection import connect
from stoker.broker.loading import (
    LOOK_EVERY,
    AsyncPatientRetry,
    LoadingProgress,
    PatientRetry,
    StillLoading,
    wait_until_loaded,
)
from stoker.cli import app
from stoker.errors import BrokerLoading, BrokerUnavailable, JobTimeout
from stoker.local.stack import wait_for_broker
from stoker.settings import Settings
from tests import loading as slow
from tests.conftest import wait_until
from tests.loading import Load, SlowBroker


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    broker = SlowBroker(Settings(home=tmp_path_factory.mktemp("slow")), port=0)
    found = broker.start()
    slow.fill(found)
    yield found
    broker.stop()


def job(url: str, job_id: str = "job") -> None:
    """A job that waits for a worker."""
    with redis.Redis.from_url(url) as client:
        client.hset(keys.job(job_id), mapping={"kind": "generate", "queue": "stoker.m.generate"})
        client.expire(keys.job(job_id), 60)


def test_a_start_waits_until_the_data_are_there_and_reports_how_far_it_is(tmp_path: Path) -> None:
    broker = SlowBroker(Settings(home=tmp_path), port=0)
    slow.fill(broker.start())
    broker.stop()
    broker.delay, reported = 200, list[str]()
    with redis.Redis.from_url(broker.start(reported.append)) as client:
        assert client.dbsize() == slow.KEYS
        assert client.get("stoker:blob:vectors:7") == slow.value(7)
    broker.stop()
    assert reported
    assert all(re.fullmatch(r"the broker is loading its data, \d+ %, about \d+ s left", text) for text in reported)


CALLS: dict[str, Callable[[Client], Any]] = {
    "workers": lambda client: client.workers(),
    "models": lambda client: client.models(),
    "jobs": lambda client: client.jobs(),
    "dead": lambda client: client.dead(),
    "status": lambda client: client.job("job").status(),
}


def test_every_call_of_a_client_waits(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(url)
    with Client(settings=Settings(url=url)) as client, slow.loading(url) as load:
        calls = [threading.Thread(target=call, args=(client,), name=name) for name, call in CALLS.items()]
        failed: list[str] = []
        monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(f"{args.thread}: {args.exc_value}"))
        with caplog.at_level(logging.WARNING):
            for call in calls:
                call.start()
            reported = re.compile(r"the broker is loading its data, \d+ %, about \d+ s left; waiting for it")
            wait_until(lambda: reported.search(caplog.text), "it is said")
            assert all(call.is_alive() for call in calls)
            load.end()
            for call in calls:
                call.join()
    assert failed == []


def test_an_asyncio_client_waits_without_holding_up_its_loop(url: str) -> None:
    async def calls(load: Load) -> None:
        async with AsyncClient(settings=Settings(url=url)) as client:
            waiting = [asyncio.create_task(call) for call in (client.workers(), client.models(), status(client))]
            await asyncio.to_thread(load.await_refusal)
            assert not any(call.done() for call in waiting)
            load.end()
            await asyncio.gather(*waiting)

    async def status(client: AsyncClient) -> Any:
        return await (await client.job("job")).status()

    job(url)
    with slow.loading(url) as load:
        asyncio.run(calls(load))


def test_who_has_no_patience_hears_how_far_the_broker_is(url: str) -> None:
    settings = Settings(url=url, patience=0)
    with slow.loading(url), Client(settings=settings) as client:
        with pytest.raises(BrokerLoading, match=r"is loading its data, \d+ %, about \d+ s left\. .* STOKER_PATIENCE"):
            client.workers()

        async def ask() -> None:
            async with AsyncClient(settings=settings) as other:
                await other.workers()

        with pytest.raises(BrokerLoading, match=r"is loading its data, \d+ %"):
            asyncio.run(ask())


def test_commands_wait_or_end_with_the_brokers_exit_code(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow.loading(url) as load:
        asked = ThreadPoolExecutor(1).submit(CliRunner().invoke, app, ["jobs", "list", "--json", "--url", url])
        load.await_refusal()
        assert not asked.done()
        load.end()
        done = asked.result()
    assert (done.exit_code, json.loads(done.stdout)) == (0, {})
    monkeypatch.setenv("STOKER_PATIENCE", "0")
    with slow.loading(url):
        for command in ("status", "generate x"):
            done = CliRunner().invoke(app, [*command.split(), "--url", url])
            assert isinstance(done.exception, BrokerLoading), command
        checks = json.loads(CliRunner().invoke(app, ["doctor", "--json", "--url", url]).stdout)
    assert BrokerLoading.exit_code == BrokerUnavailable.exit_code == 3
    assert [check["ok"] for check in checks if check["name"] == "broker"] == [False]
    assert re.search(r"loading its data, \d+ %", str(checks))


def test_a_time_limit_of_the_caller_is_shorter_than_a_long_load(url: str) -> None:
    job(url)
    with slow.loading(url), Client(settings=Settings(url=url)) as client:
        with pytest.raises(JobTimeout):
            client_job(client).result(timeout=0.2)
        assert client.redis.info("persistence")["loading"] == 1


def client_job(client: Client) -> Any:
    from stoker.client import GenerateJob

    return GenerateJob(client.link, "job")


def test_a_reader_that_waits_outlasts_the_load(url: str) -> None:
    job(url)
    record = json.dumps({"status": "REVOKED", "result": {}})
    with Client(settings=Settings(url=url)) as client:
        outcomes: list[Any] = []
        reader = threading.Thread(target=lambda: outcomes.append(attempt(client)))
        with slow.loading(url) as load:
            reader.start()
            load.await_refusal()
        client.redis.set(keys.result("job"), record, ex=60)
        client.redis.publish(keys.result("job"), record)
        reader.join(20)
        client.redis.delete(keys.result("job"))
    assert [type(outcome).__name__ for outcome in outcomes] == ["JobCancelled"]


def attempt(client: Client) -> Any:
    try:
        return client_job(client).result(timeout=20)
    except Exception as error:
        return error


def test_a_worker_of_a_broker_that_loads_waits_before_it_starts(url: str) -> None:
    reported: list[str] = []

    def report(text: str) -> None:
        reported.append(text)
        load.end()

    with slow.loading(url) as load:
        wait_for_broker(Settings(url=url, patience=0), report)
        connect(Settings(url=url)).ping()
    assert reported
    with pytest.raises(BrokerUnavailable, match="no answer"):
        wait_for_broker(Settings(url="redis://127.0.0.1:1/0", patience=0), reported.append)


def info(percent: float, read: int) -> dict[str, Any]:
    return {"loading": 1, "loading_loaded_perc": percent, "loading_eta_seconds": 3, "loading_loaded_bytes": read}


def test_a_load_that_gets_on_is_waited_for_and_one_that_stands_still_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 100_000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    reported: list[str] = []
    # Twenty seconds a look, and something new at every third.
    answers = iter([*(info(number // 3, number // 3) for number in range(150)), {"loading": 0}])
    wait_until_loaded(lambda: next(answers), "here", reported.append)
    assert len(reported) == 150
    assert reported[3 * 42] == "the broker is loading its data, 42 %, about 3 s left"
    still = iter([info(42, 42)] * 10)
    with pytest.raises(BrokerLoading, match="42 %"):
        wait_until_loaded(lambda: next(still), "here", reported.append)


def test_between_two_looks_there_is_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    answers = iter([info(1, 1), info(2, 2), {"loading": 0}])
    wait_until_loaded(lambda: next(answers), "here", lambda text: None)
    assert pauses == [LOOK_EVERY] * 2


def test_a_command_is_tried_again_for_as_long_as_the_patience_lasts_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        assert sum(pauses) < 100, "it is tried again for ever"

    monkeypatch.setattr(time, "monotonic", lambda: 100 + sum(pauses))
    monkeypatch.setattr(time, "sleep", sleep)
    retry = PatientRetry(NoBackoff(), 0, (), patience=2.5, ask=lambda: info(42, 42))

    def loads() -> None:
        raise redis.exceptions.BusyLoadingError("loading")

    with pytest.raises(StillLoading):
        retry.call_with_retry(loads, lambda error: None)
    assert pauses == [0.75, 0.75, 0.75, 0.25], "a quarter of what the broker thinks that it will take"


def test_an_asyncio_command_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        assert sum(pauses) < 100, "it is tried again for ever"

    async def ask() -> Any:
        return info(42, 42)

    async def loads() -> None:
        raise redis.exceptions.BusyLoadingError("loading")

    async def fail(error: Exception) -> None: ...

    async def call() -> None:
        monkeypatch.setattr(time, "monotonic", lambda: 100 + sum(pauses))
        monkeypatch.setattr("stoker.broker.loading.asyncio.sleep", sleep)
        with pytest.raises(StillLoading):
            await AsyncPatientRetry(NoBackoff(), 0, (), patience=2.5, ask=ask).call_with_retry(loads, fail)
        monkeypatch.undo()

    asyncio.run(call())
    assert pauses == [0.75, 0.75, 0.75, 0.25]


def test_who_waits_himself_says_so_for_as_long_as_he_does() -> None:
    assert not caller_waits()
    with own_patience():
        with pytest.raises(KeyError), own_patience():
            raise KeyError
        assert caller_waits(), "the outer one still waits"
    assert not caller_waits()


def test_a_broker_that_ends_while_it_loads_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "monotonic", lambda: 100 + sum(pauses))

    def gone() -> Any:
        raise redis.ConnectionError("closed")

    with pytest.raises(BrokerUnavailable, match="ended while it loaded"):
        wait_until_loaded(gone, "here", lambda text: None, lambda: len(pauses) < 2)
    assert pauses == [LOOK_EVERY] * 2


def test_a_broker_that_ends_or_may_not_be_asked_while_it_loads_is_an_error() -> None:
    def gone() -> Any:
        raise redis.ConnectionError("closed")

    def forbidden() -> Any:
        raise redis.exceptions.NoPermissionError("NOPERM info")

    with pytest.raises(BrokerUnavailable, match="ended while it loaded"):
        wait_until_loaded(gone, "here", lambda text: None, lambda: False)
    with pytest.raises(BrokerLoading):
        wait_until_loaded(forbidden, "here", lambda text: None)


def test_progress_that_the_broker_does_not_know_is_no_nonsense() -> None:
    assert LoadingProgress.parse({"loading": 0}) is None
    assert str(LoadingProgress.parse({"loading": 1})) == "0 %, about 1 s left"
    for percent, seconds in ((-3.0, 9), (3.0, -1), (100.5, 9), (1e300, 9)):
        strange = {"loading": 1, "loading_loaded_perc": percent, "loading_eta_seconds": seconds}
        assert str(LoadingProgress.parse(strange)) == "0 %, about 1 s left"
    whole = {"loading": 1, "loading_loaded_perc": 100.0, "loading_eta_seconds": 0}
    assert str(LoadingProgress.parse(whole)) == "100 %, about 1 s left"
