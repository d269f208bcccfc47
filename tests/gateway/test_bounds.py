"""What the gateway shows to whom, what a proxy is asked to leave alone, and what is never held in memory."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.contract.base import parse_adapter
from stoker.errors import InvalidRequest
from stoker.gateway import batch_lines, health, listing
from stoker.gateway.batch_lines import lines_of
from stoker.gateway.chat import ChatBody
from stoker.gateway.errors import Refused
from stoker.gateway.events import Event, EventResponse
from stoker.gateway.fields import checked_body
from stoker.monitor.numbers import Numbers
from stoker.testing import AsyncFakeClient

MODELS = {"base": ["generate", "adapters"], "mini": ["embed"], "other": ["generate", "adapters"], "plain": ["generate"]}


def shown(allowed: frozenset[str] | None) -> list[str]:
    async def run() -> list[str]:
        client = AsyncFakeClient(models=MODELS, adapters=["style"])
        answer = json.loads(bytes((await listing.models(client, allowed)).body))
        assert answer["object"] == "list"
        for one in answer["data"]:
            assert json.loads(bytes((await listing.model(client, one["id"], allowed)).body)) == one
        return [one["id"] for one in answer["data"]]

    return asyncio.run(run())


def test_a_caller_sees_the_models_that_it_may_use_with_their_adapters_and_no_others() -> None:
    base = ["base", "base:style", "base:style@1"]
    assert shown(frozenset({"base"})) == base
    assert shown(frozenset({"mini", "none"})) == ["mini"]
    assert shown(frozenset()) == []
    assert shown(None) == [*base, "mini", "other", "other:style", "other:style@1", "plain"], "one takes no adapters"


@pytest.mark.parametrize("name", ["other", "other:style", "base:style@2", "base:", "none"])
def test_a_model_that_a_caller_may_not_use_is_not_there(name: str) -> None:
    client = AsyncFakeClient(models=MODELS, adapters=["style"])
    with pytest.raises(Refused) as refused:
        asyncio.run(listing.model(client, name, frozenset({"base"})))
    assert (refused.value.status, refused.value.param, refused.value.code) == (404, "model", "model_not_found")


def test_nobody_between_holds_the_events_of_a_stream_back_or_keeps_them() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def made() -> Any:
        yield Event({"a": "é"}, id="job:0", name="one")

    async def stays() -> Any:
        await asyncio.Event().wait()

    unused: Any = None
    response = EventResponse(made(), unused, stays, unused)
    asyncio.run(response({"type": "http"}, unused, send))
    assert dict(sent[0]["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    body = b"".join(message.get("body", b"") for message in sent)
    assert body.decode() == 'event: one\nid: job:0\ndata: {"a":"é"}\n\n'
    assert sent[-1].get("more_body", False) is False


def test_a_line_that_is_too_long_is_not_kept_while_the_rest_of_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MOST_BYTES", 1000)

    async def parts() -> AsyncIterator[bytes]:
        yield b"\xef\xbb\xbffirst\n"
        for _ in range(300):
            yield b"x" * 10_000
        yield b"\n\n  \nlast"

    async def read() -> list[tuple[int, int, bytes | None]]:
        return [(line.number, line.index, line.data) async for line in lines_of(parts())]

    tracemalloc.start()
    try:
        found = asyncio.run(read())
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [(1, 0, b"first"), (2, 1, None), (5, 2, b"last")]
    assert most < 1_000_000, "3 MB came"


def test_a_broker_that_does_not_answer_in_time_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WITHIN", 0.01)
    asked: list[int] = []

    async def workers() -> Any:
        asked.append(1)
        await asyncio.wait_for(asyncio.Event().wait(), 20)

    async def look() -> list[Any]:
        client: Any = SimpleNamespace(workers=workers)
        made, request = health.Health(client, Numbers()), SimpleNamespace()
        return [await made.ready(request) for _ in range(2)]  # type: ignore[arg-type]

    first, second = asyncio.run(look())
    assert first is second, "an answer holds for a moment"
    assert (first.status_code, asked) == (503, [1])
    said = json.loads(bytes(first.body))
    assert said == {"status": "the broker is away", "reason": "the broker did not answer within 0.01 s."}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_fields_that_rule_each_other_out_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    body = checked_body(ChatBody, {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})
    with pytest.raises(Refused) as refused:
        body.options(9)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, "invalid_value")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("style", ("style", None)),
        ("style@3", ("style", 3)),
        *((wrong, None) for wrong in ("style@", "@1", "a@0", "a@b")),
    ],
)
def test_an_adapter_is_a_name_and_may_have_a_version(given: str, found: tuple[str, int | None] | None) -> None:
    if found is not None:
        assert parse_adapter(given) == found
        return
    with pytest.raises(InvalidRequest):
        parse_adapter(given)
