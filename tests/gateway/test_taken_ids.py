"""An `Idempotency-Key` that another client has used shows nobody's answer, at any endpoint that has one."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from stoker.gateway.app import Gateway
from stoker.testing import AsyncFakeClient
from tests.gateway.machinery import Served
from tests.gateway.test_spending import BODIES, MODELS, STREAMED


@pytest.fixture
def fake(running: Served) -> AsyncFakeClient:
    fake = AsyncFakeClient(models=MODELS)
    fake.script.generate("one two three", times=None)
    fake.script.rerank([0.5, 0.25], times=None)
    running.over(Gateway(fake))
    return fake


def asked(running: Served, path: str, user: str, **more: Any) -> httpx2.Response:
    of_user = {"metadata": {"user_id": user}} if path == "/v1/messages" else {"user": user}
    headers = {"idempotency-key": "once"}
    return httpx2.post(f"{running.url}{path}", json={**BODIES[path], **of_user, **more}, headers=headers, timeout=20)


@pytest.mark.parametrize("path", BODIES)
def test_an_id_that_another_client_has_used_is_refused_and_its_own_client_gets_the_same_answer(
    running: Served, fake: AsyncFakeClient, path: str
) -> None:
    first = asked(running, path, "one")
    assert first.status_code == 200, first.text
    refused = asked(running, path, "two")
    assert refused.status_code == 409, refused.text
    assert "the id is taken" in refused.text
    assert asked(running, path, "one").status_code == 200
    assert len(fake.sent.jobs) == 1
    if path in STREAMED:
        assert asked(running, path, "two", stream=True).status_code == 409


#: A field of each body that says what is to be done, and another value of it.
OTHERWISE: dict[str, dict[str, Any]] = {"/v1/embeddings": {"input": "another"}, "/v1/rerank": {"query": "another"}}


@pytest.mark.parametrize("path", BODIES)
def test_an_id_that_the_client_has_used_for_another_request_does_not_answer_that(
    running: Served, fake: AsyncFakeClient, path: str
) -> None:
    assert asked(running, path, "one").status_code == 200
    otherwise = OTHERWISE.get(path, {"temperature": 0.5})
    refused = asked(running, path, "one", **otherwise)
    assert refused.status_code == 400, refused.text
    assert "Idempotency-Key: 'once' given for another request" in refused.text
    backwards = dict(reversed(BODIES[path].items()))
    for same in ({}, {"priority": None}, backwards, {"stream": True} if path in STREAMED else {}):
        assert asked(running, path, "one", **same).status_code == 200
    assert len(fake.sent.jobs) == 1


@pytest.mark.parametrize("path", [path for path in BODIES if path not in STREAMED])
def test_what_has_no_stream_cannot_be_gone_on_with(running: Served, fake: AsyncFakeClient, path: str) -> None:
    headers = {"last-event-id": "once:1"}
    refused = httpx2.post(f"{running.url}{path}", json=BODIES[path], headers=headers, timeout=20)
    assert (refused.status_code, "Last-Event-ID" in refused.text) == (400, True)
    assert not fake.sent.jobs
