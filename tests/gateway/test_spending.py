"""What each endpoint counts for its caller: once an answer, what the answer itself says that it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from stoker.client._async.jobs import AsyncAnswerJob
from stoker.client.in_memory import memory
from stoker.contract import Usage
from stoker.errors import BrokerUnavailable
from stoker.gateway.app import Gateway
from stoker.gateway.calls import Caller
from stoker.testing import AsyncFakeClient
from tests.conftest import wait_until
from tests.gateway.machinery import Served

MODELS = {"chat": ["generate"], "mini": ["embed"], "bge": ["rerank"]}
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "chat", "messages": HELLO},
    "/v1/completions": {"model": "chat", "prompt": "Hello"},
    "/v1/messages": {"model": "chat", "messages": HELLO, "max_tokens": 9},
    "/v1/responses": {"model": "chat", "input": "Hello"},
    "/v1/embeddings": {"model": "mini", "input": "Hello"},
    "/v1/rerank": {"model": "bge", "query": "which?", "documents": ["a", "b"]},
}
STREAMED = [path for path in BODIES if path not in ("/v1/embeddings", "/v1/rerank")]


class Counting:
    """Lets everybody in. `spent`: what was counted."""

    def __init__(self) -> None:
        self.spent: list[int] = []

    async def caller(self, headers: Mapping[str, str]) -> Caller:
        return Caller()

    async def spend(self, caller: Caller, tokens: int) -> None:
        self.spent.append(tokens)


@pytest.fixture
def counting(running: Served, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(memory, "USAGE", Usage(prompt_tokens=7))
    fake, access = AsyncFakeClient(models=MODELS), Counting()
    fake.script.generate("one two three", times=None)
    fake.script.rerank([0.5, 0.25], times=None)
    running.over(Gateway(fake, access=access))
    return access


async def away(job: AsyncAnswerJob[Any]) -> None:
    raise BrokerUnavailable("away.")


@pytest.mark.parametrize("path", [path for path in BODIES if path not in STREAMED])
def test_what_has_been_counted_is_answered_also_where_it_cannot_leave_the_broker(
    running: Served, counting: Counting, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(AsyncAnswerJob, "discard", away)
    answer = httpx2.post(f"{running.url}{path}", json=BODIES[path], timeout=20)
    assert (answer.status_code, counting.spent) == (200, [7]), answer.text
    assert "stays in the broker for now: away." in caplog.text


def taken(usage: dict[str, int]) -> int:
    return usage.get("total_tokens", usage.get("input_tokens", 0) + usage.get("output_tokens", 0))


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_counts_once_as_what_it_says_that_it_took(running: Served, counting: Counting, path: str) -> None:
    answer = httpx2.post(f"{running.url}{path}", json=BODIES[path], timeout=20)
    assert answer.status_code == 200, answer.text
    assert counting.spent == [taken(answer.json()["usage"])]
    assert counting.spent[0] > 0


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_counts_as_the_whole_answer_does(running: Served, counting: Counting, path: str) -> None:
    httpx2.post(f"{running.url}{path}", json=BODIES[path], timeout=20)
    with httpx2.stream("POST", f"{running.url}{path}", json={**BODIES[path], "stream": True}, timeout=20) as streamed:
        streamed.read()
    wait_until(lambda: len(counting.spent) == 2, "the stream is counted")
    whole, stream = counting.spent
    assert stream == whole > 0
