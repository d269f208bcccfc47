"""An `Idempotency-Key` that another client has used shows nobody's answer, at any endpoint that has one."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from stoker.gateway.app import Gateway
from stoker.testing import AsyncFakeClient
from tests.gateway.machinery import Served
from tests.gateway.test_spending import BODIES, HELLO, MODELS, STREAMED


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


#: Of each body: fields that ask for what is done without them, too.
_GENERATED: list[dict[str, Any]] = [
    {"temperature": 1, "top_p": 1.0, "tools": []}, {"priority": 5}, {"ignore_eos": False, "min_p": None},
]  # fmt: skip
_OF_OPENAI: list[dict[str, Any]] = [{"n": 1, "stop": None, "logit_bias": {}}, {"service_tier": "default"}]
USUAL: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        *_GENERATED, *_OF_OPENAI, {"tool_choice": "auto", "response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"functions": [], "logprobs": False, "store": False}, {"messages": [{**HELLO[0], "name": None}]},
        {"chat_template_kwargs": {}},
    ],
    "/v1/completions": [
        *[{**fields, "tools": None} for fields in _GENERATED], *_OF_OPENAI, {"max_tokens": 16}, {"prompt": ["Hello"]},
        {"echo": False, "best_of": 1},
    ],
    "/v1/messages": [*_GENERATED, {"tool_choice": {"type": "auto"}}, {"stop_sequences": [], "service_tier": "auto"}],
    "/v1/responses": [
        *_GENERATED, {"tool_choice": "auto", "store": False}, {"text": {"format": {"type": "text"}}}, {"include": []},
        {"truncation": "disabled", "service_tier": "default"},
    ],
    "/v1/embeddings": [{"input": ["Hello"]}, {"truncation": "error", "priority": 5}, {"dimensions": None}],
    "/v1/rerank": [{"truncation": "error", "priority": 5}, {"top_n": 1, "return_documents": True}],
}  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
def test_a_request_that_says_what_is_usual_is_the_one_that_leaves_it_out(
    running: Served, fake: AsyncFakeClient, path: str
) -> None:
    assert asked(running, path, "one").status_code == 200
    for same in USUAL[path]:
        again = asked(running, path, "one", **same)
        assert again.status_code == 200, (same, again.text)
    assert len(fake.sent.jobs) == 1
    other = asked(running, path, "one", priority=4)
    assert other.status_code == 400, "what differs is another request still"


def test_the_older_name_of_a_limit_asks_for_the_same(running: Served, fake: AsyncFakeClient) -> None:
    for limit in ("max_tokens", "max_completion_tokens"):
        assert asked(running, "/v1/chat/completions", "one", **{limit: 9}).status_code == 200
    assert asked(running, "/v1/chat/completions", "one", max_tokens=8).status_code == 400
    assert len(fake.sent.jobs) == 1


@pytest.mark.parametrize("path", [path for path in BODIES if path not in STREAMED])
def test_what_has_no_stream_cannot_be_gone_on_with(running: Served, fake: AsyncFakeClient, path: str) -> None:
    headers = {"last-event-id": "once:1"}
    refused = httpx2.post(f"{running.url}{path}", json=BODIES[path], headers=headers, timeout=20)
    assert (refused.status_code, "Last-Event-ID" in refused.text) == (400, True)
    assert not fake.sent.jobs
