"""What supervisors and Prometheus ask of a gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from stoker import AsyncClient, errors
from stoker.contract import Presence
from stoker.contract.codec import CONTRACT
from stoker.gateway import health
from stoker.gateway.access import Keyed
from stoker.gateway.app import Gateway
from stoker.monitor.numbers import Numbers
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient
from tests.conftest import wait_until
from tests.gateway.conftest import CHAT, EMBED
from tests.gateway.machinery import Served
from tests.monitor.scraped import Scrape
from tests.monitor.test_overview import card, presence

PATH = "/v1/chat/completions"


def test_a_broker_that_does_not_answer_at_once_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks has a time limit of its own, and would take the gateway for dead."""
    monkeypatch.setattr(health, "WITHIN", 0.01)

    class Mute(AsyncFakeClient):
        async def workers(self) -> list[Presence]:
            await asyncio.Event().wait()
            return []

    async def ask() -> Any:
        request = Request({"type": "http", "method": "GET", "path": "/readyz", "headers": []})
        async with asyncio.timeout(20):
            return await health.Health(Mute(), Numbers()).ready(request)

    answer = asyncio.run(ask())
    assert (answer.status_code, b"did not answer within 0.01 s" in answer.body) == (503, True)


def test_many_who_ask_at_once_ask_the_broker_once() -> None:
    asked, answer = list[int](), asyncio.Event()

    class Slow(AsyncFakeClient):
        async def workers(self) -> list[Presence]:
            asked.append(1)
            await answer.wait()
            return []

    async def ask() -> list[int]:
        known = health.Health(Slow(), Numbers())
        request = Request({"type": "http", "method": "GET", "path": "/readyz", "headers": []})
        many = [asyncio.ensure_future(known.ready(request)) for _ in range(50)]
        while not asked:
            await asyncio.sleep(0)
        for _ in range(200):
            await asyncio.sleep(0)
        many[0].cancel()
        answer.set()
        return [found.status_code for found in await asyncio.gather(*many[1:])]

    assert asyncio.run(ask()) == [503] * 49
    assert len(asked) == 1


def test_a_gateway_is_ready_while_its_broker_answers_and_a_model_is_warm(
    served: Served, http: httpx2.Client, fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "HOLDS", 0.0)
    assert http.get("/readyz").json() == {"status": "ok", "models": [EMBED, CHAT]}
    served.over(Gateway(AsyncFakeClient(models={})))
    assert (http.get("/readyz").status_code, http.get("/healthz").status_code) == (503, 200)
    away = AsyncClient(settings=Settings(url="redis://127.0.0.1:1/0", patience=0))
    served.over(Gateway(away, access=Keyed(away, required=True)))
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "the broker is away")
    # Health needs no key, and nothing else is open.
    assert http.get("/healthz").status_code == http.get("/metrics").status_code == 200
    assert http.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8", "Prometheus' own"
    assert http.get("/v1/models").status_code == 503
    served.closing(away)


def test_readiness_is_asked_of_the_broker_once_for_a_while(
    http: httpx2.Client, fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "HOLDS", 60.0)
    asked = []
    workers = fake.link.workers

    async def counted() -> object:
        asked.append(1)
        return await workers()

    fake.link.workers = counted  # type: ignore[method-assign, assignment]
    assert [http.get("/readyz").status_code for _ in range(5)] == [200] * 5
    assert len(asked) == 1


def test_readiness_is_asked_again_once_its_answer_holds_no_more_and_a_foreign_contract_is_not_warm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, contract = 1000.0, CONTRACT

    class Link:
        async def workers(self) -> list[Presence]:
            return [presence(models=(card().model_copy(update={"contract": contract}),))]

    monkeypatch.setattr("stoker.gateway.health.time.monotonic", lambda: now)
    asked: Any = Link()
    probe, request = health.Health(asked, Numbers()), Request({"type": "http"})
    said = [asyncio.run(probe.ready(request)).status_code]
    contract = CONTRACT + 1
    said.append(asyncio.run(probe.ready(request)).status_code)
    now += health.HOLDS
    said.append(asyncio.run(probe.ready(request)).status_code)
    assert said == [200, 200, 503]


def test_requests_are_counted_by_endpoint_and_status_and_names_of_others_make_no_series(
    http: httpx2.Client, fake: AsyncFakeClient
) -> None:
    fake.script.generate("It was a dark night.")
    body = {"model": CHAT, "messages": [{"role": "user", "content": "Hello"}]}
    assert http.post(PATH, json=body).status_code == 200
    assert http.post(PATH, json={}).status_code == 400
    for number in range(3):
        http.get(f"/v1/other-{number}")
    fake.script.refuse(errors.QueueFull("full.", wait=1.0))
    assert http.post(PATH, json=body).status_code == 429

    def scraped() -> Scrape:
        return Scrape.of(http.get("/metrics").text)

    # A request is counted once its answer is out.
    total = "stoker_gateway_requests_total"
    wait_until(
        lambda: total in scraped().samples and scraped().value(total, endpoint=PATH, status="429") == 1, "counted"
    )
    found = scraped()
    assert [found.value(total, endpoint=PATH, status=status) for status in ("200", "400", "429")] == [1, 1, 1]
    assert found.value(total, endpoint="other", status="404") == 3
    assert found.value("stoker_gateway_request_duration_seconds_count", endpoint=PATH) == 3
    assert found.value("stoker_gateway_first_byte_seconds_count", endpoint=PATH) == 3
    assert found.value("stoker_gateway_requests_open", endpoint=PATH) == 0
    assert found.value("stoker_gateway_requests_open", endpoint="/metrics") == 1
