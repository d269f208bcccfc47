"""Requests that wait for one job: who takes it from the others when it leaves, and who counts what the job takes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

from stoker.broker.outcome import JobStatus
from stoker.client.in_memory import memory
from stoker.client.in_memory.answers import generated
from stoker.contract import Usage
from stoker.errors import BrokerUnavailable, StokerError
from stoker.gateway.app import Gateway
from stoker.gateway.waiting import Waiter, Waiting
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient
from tests import hurried
from tests.conftest import wait_until
from tests.gateway.machinery import Served
from tests.gateway.test_spending import BODIES, MODELS, Counting

CHAT = "/v1/chat/completions"
STREAM: dict[str, Any] = {"stream": True}
TEXT = "It was a dark night."
USAGE = Usage(prompt_tokens=100, completion_tokens=5)


class House:
    """A gateway over a client in memory, whose jobs hang until they are let go."""

    def __init__(self, served: Served, patience: float = 30.0) -> None:
        self.fake, self.access = AsyncFakeClient(models=MODELS, settings=Settings(patience=patience)), Counting()
        self.fake.script.generate(TEXT, hangs=True, times=None)
        self.fake.script.embed(hangs=True)
        self.fake.script.rerank([0.5, 0.25], hangs=True)
        self.gateway = Gateway(self.fake, access=self.access)
        self.url, self._port = served.url, served.port
        served.over(self.gateway)

    @property
    def waiting(self) -> int:
        return sum(len(of) for of in list(self.gateway.waiting.of.values()))

    @property
    def status(self) -> JobStatus:
        return self.fake._memory.job("order-7").status  # noqa: SLF001  asked from another thread

    def let_go(self) -> None:
        """The worker comes to the end of the job."""
        job = self.fake._memory.job("order-7")  # noqa: SLF001
        job.answer = replace(job.answer, ending=replace(job.answer.ending, hangs=False))

    @contextmanager
    def asked(
        self, path: str = CHAT, *, said: str | None = "cancel", name: str = "idempotency-key: order-7", **fields: Any
    ) -> Iterator[socket.socket]:
        """A request that waits, and has left behind. `said`: what becomes of its job then."""
        body, before = json.dumps({**BODIES[path], **fields}).encode(), self.waiting
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        head += "" if said is None else f"x-stoker-on-disconnect: {said}\r\n"
        head += f"{name}\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self._port), timeout=20) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: self.waiting == before + 1 and self.fake.sent.jobs, "it has sent its job")
            wait_until(lambda: self.status is JobStatus.RUNNING, "the job runs")
            yield connection
        wait_until(lambda: self.waiting <= before, "it has left")

    def goes_on(self, last: str) -> httpx2.Response:
        body, headers = {**BODIES[CHAT], **STREAM}, {"last-event-id": last}
        return httpx2.post(f"{self.url}{CHAT}", json=body, headers=headers, timeout=20)


@pytest.fixture
def house(running: Served, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(memory, "USAGE", USAGE)
    monkeypatch.setattr(memory, "generated", lambda *given: generated(*given).model_copy(update={"usage": USAGE}))
    return House(running)


@pytest.mark.parametrize("fields", [{}, STREAM], ids=["whole", "streamed"])
def test_one_that_leaves_does_not_take_the_answer_of_the_other_and_the_last_one_cancels(
    house: House, fields: dict[str, Any]
) -> None:
    with house.asked(**fields):
        with house.asked(**fields):
            pass
        assert house.status is JobStatus.RUNNING
    wait_until(lambda: house.status is JobStatus.CANCELLED, "the last one cancels it")
    assert not house.gateway.waiting.of, "nothing is kept of requests that have left"


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/rerank"])
def test_the_answer_comes_to_the_one_that_stays_and_is_counted_once(house: House, path: str) -> None:
    with house.asked(path) as stays:
        with house.asked(path):
            pass
        house.let_go()
        assert stays.recv(65536).startswith(b"HTTP/1.1 200")
    assert house.access.spent == [100 + 5 * (path == CHAT)]


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/rerank"])
def test_a_job_that_goes_on_without_its_client_is_counted_at_its_end(house: House, path: str) -> None:
    with house.asked(path, said="continue"):
        pass
    assert not house.access.spent
    house.let_go()
    wait_until(lambda: house.access.spent, "it is counted")
    assert house.access.spent == [100 + 5 * (path == CHAT)]


def test_a_stream_that_goes_on_without_its_client_is_counted_to_its_end(house: House) -> None:
    with house.asked(said="continue", **STREAM):
        pass
    wait_until(lambda: house.access.spent, "what came is counted")
    house.let_go()
    wait_until(lambda: sum(house.access.spent) == 105, "and the rest")
    assert house.access.spent == [5, 100]


def test_a_job_that_another_request_only_goes_on_with_is_counted_by_the_one_that_sent_it(house: House) -> None:
    with house.asked(said="continue", **STREAM):
        pass
    house.let_go()
    rest = house.goes_on("order-7:0.0")
    assert rest.status_code == 200
    assert "night" in rest.text
    wait_until(lambda: sum(house.access.spent) == 105, "it is counted once")


def test_what_was_made_before_a_client_left_is_counted_though_it_waited_for_the_whole(house: House) -> None:
    """It may go on with the stream of the job that it has cancelled."""
    with house.asked(CHAT, logprobs=True):
        pass
    wait_until(lambda: house.access.spent, "it is counted")
    assert house.access.spent == [5]
    assert "night" in house.goes_on("order-7:0.0").text
    assert house.access.spent == [5]


@pytest.mark.parametrize(("last", "token"), [("5", 5), ("999999999", 999_999_999), ("5.0", 5)])
def test_a_client_that_has_a_token_which_was_never_made_is_refused(house: House, last: str, token: int) -> None:
    with house.asked(said="continue"):
        pass
    house.let_go()
    refused = house.goes_on(f"order-7:{last}")
    assert refused.status_code == 400
    assert f"token {token} of job order-7 given; it has 5 tokens" in refused.json()["error"]["message"]
    assert house.goes_on("order-7:4").status_code == 200, "it has them all, and the end comes"


def test_a_job_that_only_its_readers_wait_for_is_counted_for_the_one_that_sent_it(house: House) -> None:
    with house.asked(**STREAM) as sender, house.asked(name="last-event-id: order-7:0", **STREAM):
        sender.close()
        wait_until(lambda: house.waiting == 1, "who sent it has left")
        house.let_go()
        wait_until(lambda: sum(house.access.spent) == 105, "it is counted once")
        wait_until(lambda: house.waiting == 0, "the other has all")


@pytest.mark.parametrize(
    ("path", "fields"),
    [(CHAT, {}), (CHAT, STREAM), ("/v1/embeddings", {}), ("/v1/rerank", {})],
    ids=["whole", "streamed", "embeddings", "rerank"],
)
def test_a_request_that_is_sent_again_after_its_connection_broke_has_the_answer_and_is_counted_once(
    house: House, path: str, fields: dict[str, Any]
) -> None:
    """Clients do so by themselves."""
    for _ in range(2):
        with house.asked(path, said=None, **fields):
            pass
    with house.asked(path, said=None, **fields) as again:
        house.let_go()
        assert again.recv(65536).startswith(b"HTTP/1.1 200")
        while again.recv(65536):
            pass
    assert len(house.fake.sent.jobs) == 1
    wait_until(lambda: sum(house.access.spent) >= 100, "it is counted")
    assert sum(house.access.spent) == 100 + 5 * (path == CHAT)
    assert not house.gateway.waiting.of, "nothing is kept of requests that have left"
    assert not house.gateway.waiting.lingering, "nor of one that came again"


def test_openais_package_which_sends_again_what_took_too_long_has_the_answer(
    house: House, package: openai.OpenAI
) -> None:
    impatient = package.with_options(timeout=0.3, max_retries=20)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            impatient.completions.create, model="chat", prompt="Hello", extra_headers={"idempotency-key": "order-7"}
        )
        wait_until(lambda: house.gateway.waiting.lingering, "its connection broke")
        house.let_go()
        assert answer.result(20).choices[0].text == TEXT
    assert len(house.fake.sent.jobs) == 1


def test_a_job_whose_client_does_not_come_again_is_cancelled_after_the_patience_and_what_it_made_is_counted(
    house: House, running: Served
) -> None:
    impatient = House(running, patience=0.01)
    with impatient.asked(said=None):
        pass
    wait_until(lambda: impatient.status is JobStatus.CANCELLED, "it is cancelled")
    wait_until(lambda: impatient.access.spent == [5], "it is counted")
    assert not impatient.gateway.waiting.lingering


def test_a_stream_that_is_gone_on_with_after_its_connection_broke_is_counted_once(house: House) -> None:
    with house.asked(said=None, **STREAM):
        pass
    wait_until(lambda: house.access.spent, "what came is counted")
    house.let_go()
    assert "night" in house.goes_on("order-7:0.0").text
    wait_until(lambda: sum(house.access.spent) == 105, "it is counted once")
    assert not house.gateway.waiting.lingering


def test_what_a_stream_that_is_only_gone_on_with_had_is_counted_for_the_request_that_counts(house: House) -> None:
    with house.asked(said=None, **STREAM):
        pass
    wait_until(lambda: house.access.spent, "what came is counted")
    # As if another gateway had sent the job, which ended before it counted.
    house.access.spent.clear()
    ((key, before),) = house.gateway.waiting.lingering.items()
    house.gateway.waiting.lingering[key] = replace(before, counted=None)
    with house.asked(said=None, name="last-event-id: order-7:0", **STREAM):
        pass
    with house.asked(said=None) as whole:
        house.let_go()
        assert whole.recv(65536).startswith(b"HTTP/1.1 200")
    assert house.access.spent == [105]


class Left:
    """A request that has left its job, in time that is simulated; how it goes on with others for the same job."""

    def __init__(self) -> None:
        self.waiting, self.cancelled_at = Waiting(), list[float]()
        self.trouble: StokerError | None = None

    def waiter(self) -> Waiter:
        return Waiter(self.waiting, ("team", "order-7"), _ignored, keep=False, counts=True, lingers=30.0)

    async def cancel(self) -> None:
        self.cancelled_at.append(asyncio.get_running_loop().time())
        if self.trouble is not None:
            raise self.trouble

    async def begins(self) -> None:
        with self.waiter() as waiter:
            await waiter.has_sent(self.cancel, _nothing)()


async def _ignored(tokens: int) -> None: ...


async def _nothing() -> int:
    return 0


def test_a_job_is_cancelled_where_the_request_that_came_again_was_refused() -> None:
    left = Left()

    async def run() -> None:
        await left.begins()
        with left.waiter():
            await asyncio.sleep(45)
            assert not left.cancelled_at, "the other one may be accepted yet"
        await asyncio.sleep(30)

    hurried.run(run())
    assert left.cancelled_at == [60]


def test_each_time_that_a_request_comes_again_its_job_is_waited_for_anew() -> None:
    left = Left()

    async def run() -> None:
        for _ in range(3):
            await left.begins()
            await asyncio.sleep(20)
        await asyncio.sleep(20)

    hurried.run(run())
    assert left.cancelled_at == [70], "once, 30 seconds behind the last one"


def test_a_job_that_cannot_be_cancelled_behind_its_client_is_said(caplog: pytest.LogCaptureFixture) -> None:
    left = Left()
    left.trouble = BrokerUnavailable("no answer.")

    async def run() -> None:
        await left.begins()
        await asyncio.sleep(31)

    hurried.run(run())
    assert "job order-7, whose client has left, is not cancelled: no answer." in caplog.text


def test_a_gateway_that_ends_waits_for_nothing_on_behalf_of_clients_that_have_left() -> None:
    async def run() -> None:
        gateway = Gateway(AsyncFakeClient())
        async with gateway.background():
            gateway.waiting.go_on(asyncio.sleep(3600))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_what_cannot_be_counted_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async def away() -> int:
        raise BrokerUnavailable("no answer.")

    async def unused() -> None:
        raise AssertionError("it is neither cancelled nor counted")

    async def run() -> None:
        waiting = Waiting()
        waiter = Waiter(waiting, ("team", "order-7"), lambda tokens: unused(), keep=True, counts=True)
        with waiter:
            await waiter.left(unused, away)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert "what job order-7 takes behind its client is not counted: no answer." in caplog.text
