"""A request whose model no worker serves just now: how long it waits, what it hears, and what becomes of its job."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from stoker import AsyncClient, Client
from stoker.broker import keys, ledger
from stoker.broker.outcome import JobStatus
from stoker.contract import ModelCard, Presence
from stoker.contract.presence import ModelState
from stoker.contract.requests import RERANK
from stoker.errors import BrokerUnavailable, JobTimeout, StokerError, WorkerUnavailable
from stoker.gateway import attendance
from stoker.gateway.attendance import LOOK_EVERY, Attendance
from stoker.gateway.batch_answers import Answerer
from stoker.gateway.calls import Call, Caller, Models, NamedJob
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient
from tests import hurried
from tests.conftest import wait_until
from tests.gateway.machinery import Served, gateway_over
from tests.gateway.test_spending import BODIES, STREAMED
from tests.integration.machinery import TINY, TINY_MODEL, FragileBroker, worker_on

PATIENCE = 30.0


def worker(*cards: ModelCard, offers: tuple[ModelCard, ...] = (), states: tuple[ModelState, ...] = ()) -> Presence:
    return Presence(
        worker="w", host="here", pid=5, device="cpu", started=0.0, time=0.0, models=cards, adapters={}, lanes={},
        memory_bytes=1, offers=offers, states=states,
    )  # fmt: skip


def card(model: str = "m", *kinds: str, **fields: Any) -> ModelCard:
    return ModelCard(model=model, architecture="x", kinds=kinds or ("generate",), context=64, parameters=1, **fields)


class House(AsyncFakeClient):
    """A client in memory whose workers a test says, once its job is sent. Each look at them takes the next step of
    `plan`."""

    def __init__(self) -> None:
        super().__init__(models={"m": ["generate"], "other": ["generate"]}, settings=Settings(patience=PATIENCE))
        self.there: list[Presence] = []
        self.has_sent = False
        self.plan: Iterator[Callable[[], None]] = iter(())
        self.script.generate("one", times=None)

    async def workers(self) -> list[Presence]:
        if not self.has_sent:
            return [worker(card())]
        next(self.plan, lambda: None)()
        return self.there

    async def waits(
        self, within: Awaitable[Any] | None = None, *, keep: bool | None = None, given: bool = False
    ) -> float:
        """A request waits for a job that no worker begins. How long it did; raises what it hears."""
        job = await self.generate("Hello", model="m", job_id="job")
        self.has_sent = True
        call = Call(self, Caller(), Models(self), b"", NamedJob("job", given), keep, _never, _counts)
        waiter = call.waits(self)

        async def left() -> None:
            await waiter.left(job.cancel, _nothing)

        clock = asyncio.get_running_loop().time
        since = clock()
        with waiter:
            self.attendance = Attendance(call, "m", "generate", job, waiter, left)
            try:
                async with self.attendance.needed():
                    await (within or asyncio.Event().wait())
            finally:
                self.waited = clock() - since
        return self.waited

    @property
    def status(self) -> JobStatus:
        return self._memory.job("job").status


async def _never() -> Any:
    await asyncio.Event().wait()


async def _counts(caller: Caller, tokens: int) -> None: ...


async def _nothing() -> int:
    return 0


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> House:
    # What workers said holds no longer than one look: the clock of these tests is not that of the looks.
    monkeypatch.setattr(keys, "PRESENCE_EVERY", 0.0)
    return House()


def test_a_request_that_no_worker_is_there_for_is_given_up_after_the_patience_with_its_job(house: House) -> None:
    house.there = [worker(card("other"))]
    with pytest.raises(WorkerUnavailable) as caught:
        hurried.run(house.waits())
    assert PATIENCE <= house.waited <= PATIENCE + 2 * LOOK_EVERY
    assert house.status is JobStatus.CANCELLED
    assert str(caught.value) == (
        "model 'm' given; it was served lately, and for 30 s no worker has been there for it; of the models warm now "
        "other can generate. Start its worker again, or ask for another model."
    )


@pytest.mark.parametrize("named", [{"given": True}, {"keep": True}], ids=["its id was given", "it is to go on"])
def test_a_job_that_its_client_can_find_again_goes_on_waiting_and_the_error_says_how(
    house: House, named: dict[str, bool]
) -> None:
    with pytest.raises(
        WorkerUnavailable, match=r"Job job goes on waiting: its id as Idempotency-Key finds it again\.$"
    ):
        hurried.run(house.waits(**named))  # type: ignore[arg-type]
    assert house.status is JobStatus.QUEUED


def test_a_job_with_an_id_goes_where_its_client_has_said_so(house: House) -> None:
    with pytest.raises(WorkerUnavailable, match=r"another model\.$"):
        hurried.run(house.waits(given=True, keep=False))
    assert house.status is JobStatus.CANCELLED


@pytest.mark.parametrize(
    "there",
    [
        worker(card()),
        worker(offers=(card(),)),
        worker(states=(ModelState(model="m", state="loading"),)),
    ],
    ids=["warm", "offered", "loading"],
)
def test_where_a_worker_is_there_or_may_be_its_request_waits(house: House, there: Presence) -> None:
    house.there = [there]
    assert hurried.run(house.waits(asyncio.sleep(10 * PATIENCE))) == 10 * PATIENCE


@pytest.mark.parametrize(
    "there",
    [
        worker(card("other")),
        worker(card("m", "embed")),
        worker(card("m", "embed", reranks=True)),
        worker(card(contract=0)),
        worker(states=(ModelState(model="m", state="refused"),)),
        worker(states=(ModelState(model="other", state="loading"),)),
    ],
    ids=["another model", "another ability", "a reranker", "another release", "refused", "another is loading"],
)
def test_a_worker_that_runs_no_such_job_is_as_good_as_none(house: House, there: Presence) -> None:
    house.there = [there]
    with pytest.raises(WorkerUnavailable):
        hurried.run(house.waits())


def test_a_worker_that_comes_back_in_time_is_waited_for_and_so_is_the_next_one(house: House) -> None:
    """It restarts again and again: each time it has the whole patience."""
    away = int(PATIENCE / LOOK_EVERY)
    steps: list[Callable[[], None]] = []
    for _ in range(3):
        steps += (
            [lambda: house.there.clear()] + [lambda: None] * (away - 1) + [lambda: house.there.append(worker(card()))]
        )
    house.plan = iter(steps)
    assert hurried.run(house.waits(asyncio.sleep(len(steps) * LOOK_EVERY))) > 3 * PATIENCE


def test_a_job_that_has_begun_is_waited_for_though_its_worker_is_gone(house: House) -> None:
    def dies() -> None:
        house._memory.job("job").status = JobStatus.RUNNING  # noqa: SLF001  as a worker does that dies then

    house.plan = iter([lambda: None, dies])
    assert hurried.run(house.waits(asyncio.sleep(10 * PATIENCE))) == 10 * PATIENCE
    assert not house.attendance.in_doubt


def test_a_broker_that_is_away_says_nothing_of_workers(house: House) -> None:
    def away() -> None:
        raise BrokerUnavailable("it is away.")

    almost = int(PATIENCE / LOOK_EVERY) - 1
    house.plan = iter([*[lambda: None] * almost, away])
    with pytest.raises(WorkerUnavailable):
        hurried.run(house.waits())
    assert house.waited > 2 * PATIENCE - 3 * LOOK_EVERY, "it has the whole patience behind that"


def test_an_answer_is_in_doubt_while_no_worker_is_there_and_only_then(house: House) -> None:
    seen: list[bool] = []

    async def looks() -> None:
        for _ in range(4):
            await asyncio.sleep(LOOK_EVERY)
            await asyncio.sleep(LOOK_EVERY / 2)
            seen.append(house.attendance.in_doubt)
            await asyncio.sleep(LOOK_EVERY / 2)

    house.there = [worker(card())]
    house.plan = iter(
        [lambda: None, lambda: house.there.clear(), lambda: None, lambda: house.there.append(worker(card()))]
    )
    hurried.run(house.waits(looks()))
    assert seen == [False, True, False, False]
    assert not house.attendance.in_doubt, "what has come is in no doubt"


def test_a_time_limit_of_the_waiting_itself_stays_what_it_is(house: House) -> None:
    async def late() -> None:
        raise JobTimeout("nothing came.")

    with pytest.raises(JobTimeout, match="nothing came"):
        hurried.run(house.waits(late()))
    assert house.status is JobStatus.QUEUED


# Over a broker, which knows the model and no worker.

KINDS = {"/v1/embeddings": "embed", "/v1/rerank": RERANK}


@pytest.fixture
def settings(broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(attendance, "LOOK_EVERY", 0.02)
    for path, body in BODIES.items():
        kind = KINDS.get(path, "generate")
        known = card(body["model"], "embed" if kind == RERANK else kind, reranks=kind == RERANK, seen=time.time())
        redis.hset(keys.MODELS, f"{known.model}/{known.contract}", known.model_dump_json())
    redis.expire(keys.MODELS, 60)
    return broker.model_copy(update={"patience": 0.0})


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    made = Served(gateway_over(settings))
    yield made
    made.stop()


def open_jobs(redis: Any) -> set[str]:
    found = [redis.zrange(name, 0, -1) for name in redis.scan_iter("stoker:open:*")]
    return {job.decode() for jobs in found for job in jobs}


@pytest.mark.parametrize("path", BODIES)
def test_a_client_of_any_endpoint_hears_at_once_that_nobody_is_there(served: Served, redis: Any, path: str) -> None:
    for more in ({}, {"stream": True}) if path in STREAMED else ({},):
        answer = httpx2.post(f"{served.url}{path}", json={**BODIES[path], **more}, timeout=20)
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"] == "5"
        assert answer.headers["x-should-retry"] == "true"
        assert "no worker has been there for it; no model that is warm now can" in answer.json()["error"]["message"]
        assert not open_jobs(redis), "the job went with its request"


def test_a_request_with_an_idempotency_key_finds_its_job_where_it_was(served: Served, redis: Any) -> None:
    path, headers = "/v1/chat/completions", {"idempotency-key": "order-7"}
    for _ in range(2):
        answer = httpx2.post(f"{served.url}{path}", json=BODIES[path], headers=headers, timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_unavailable")
        assert open_jobs(redis) == {"order-7"}


def test_a_line_of_a_batch_waits_for_its_worker_as_before(served: Served, settings: Settings, redis: Any) -> None:
    path = "/v1/chat/completions"
    body = httpx2.Request("POST", "http://localhost", json=BODIES[path]).content

    async def run() -> None:
        async with AsyncClient(settings=settings) as client:
            line = asyncio.ensure_future(Answerer(client, Caller(), Models(client), path).answer("line", body, set()))
            await asyncio.to_thread(wait_until, lambda: open_jobs(redis) == {"line"}, "it has sent its job")
            async with httpx2.AsyncClient(timeout=20) as http:
                refused = await http.post(f"{served.url}{path}", json=BODIES[path])
            assert refused.status_code == 503
            assert not line.done()
            line.cancel()
            with suppress(asyncio.CancelledError, StokerError):
                await line

    asyncio.run(run())
    assert open_jobs(redis) == {"line"}


def test_a_job_is_begun_once_a_worker_has_had_it_also_when_it_waits_again(settings: Settings, redis: Any) -> None:
    async def run() -> list[bool]:
        async with AsyncClient(settings=settings) as client:
            job = await client.generate("Hello", model="chat", job_id="job")
            seen = [await job.link.begun("job"), await job.link.begun("unknown")]
            assert ledger.claim(redis, "job", keys.queue("chat", "generate"), "token", "tag", "w").state == "run"
            seen.append(await job.link.begun("job"))
            assert ledger.release(redis, "job", keys.queue("chat", "generate"), "token")
            return [*seen, await job.link.begun("job")]

    assert asyncio.run(run()) == [False, False, True, True]


@pytest.mark.integration
@pytest.mark.slow
def test_a_worker_that_was_killed_and_starts_again_answers_those_who_asked_meanwhile(tmp_path: Path) -> None:
    """And once it has left for good, they hear that: a stream too, by its status."""
    body = {"model": TINY_MODEL, "prompt": "t1 t2", "max_tokens": 4}

    def ask(served: Served, **more: Any) -> httpx2.Response:
        return httpx2.post(f"{served.url}/v1/completions", json={**body, **more}, timeout=100)

    with closing(FragileBroker(tmp_path / "broker")) as broker, ThreadPoolExecutor() as pool:
        settings = Settings(url=broker.url)
        with Client(settings=settings) as client:
            served = Served(gateway_over(settings))
            with worker_on(broker, tmp_path / "one", models=(TINY,)):
                os.kill(client.workers()[0].pid, signal.SIGKILL)
            wait_until(lambda: not client.workers(), "nobody is there")
            asked = [pool.submit(ask, served, stream=stream) for stream in (False, True)]
            wait_until(lambda: len(client.jobs()) == 2, "both wait")
            with worker_on(broker, tmp_path / "one", models=(TINY,)):
                assert [answer.result().status_code for answer in asked] == [200, 200]
            served.stop()
            served = Served(gateway_over(settings.model_copy(update={"patience": 0.5})))
            assert [ask(served, stream=stream).status_code for stream in (False, True)] == [503, 503]
            served.stop()
