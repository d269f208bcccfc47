"""What the gateway shows to whom, what a proxy is asked to leave alone, and what is never held in memory."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.contract import Presence
from stoker.contract.base import parse_adapter
from stoker.errors import InvalidRequest
from stoker.gateway import batch_lines, health, listing
from stoker.gateway.access import AnyCaller
from stoker.gateway.app import Gateway
from stoker.gateway.batch_lines import lines_of
from stoker.gateway.calls import Caller
from stoker.gateway.chat import ChatBody
from stoker.gateway.errors import Refused
from stoker.gateway.events import Event, EventResponse
from stoker.gateway.fields import check_schema, checked_body
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


@pytest.mark.parametrize("started", [(300.9, 100.9, 200.9), (100.9, 200.9, 300.9)])
def test_a_model_is_there_since_the_first_of_its_workers_began(
    started: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = AsyncFakeClient(models={"base": ["generate"]})
    (worker,) = asyncio.run(client.workers())

    async def workers() -> list[Presence]:
        return [worker.model_copy(update={"started": time}) for time in started]

    monkeypatch.setattr(client, "workers", workers)
    answer = json.loads(bytes(asyncio.run(listing.model(client, "base", None)).body))
    assert answer["created"] == 100


@pytest.mark.parametrize("name", ["other", "other:style", "base:style@2", "base:", "none"])
def test_a_model_that_a_caller_may_not_use_is_not_there(name: str) -> None:
    client = AsyncFakeClient(models=MODELS, adapters=["style"])
    with pytest.raises(Refused) as refused:
        asyncio.run(listing.model(client, name, frozenset({"base"})))
    assert (refused.value.status, refused.value.param, refused.value.code) == (404, "model", "model_not_found")


class OfBase(AnyCaller):
    """A key that may use one model."""

    async def caller(self, headers: Mapping[str, str]) -> Caller:
        return Caller("team", frozenset({"base"}))


def test_both_pages_of_models_go_by_the_key_that_asks() -> None:
    gateway = Gateway(AsyncFakeClient(models=MODELS), access=OfBase())

    def asked(name: str) -> Any:
        return SimpleNamespace(headers={}, path_params={"name": name})

    assert json.loads(bytes(asyncio.run(gateway.show_model(asked("base"))).body))["id"] == "base"
    with pytest.raises(Refused, match="no model of that name"):
        asyncio.run(gateway.show_model(asked("other")))
    listed = json.loads(bytes(asyncio.run(gateway.list_models(asked(""))).body))["data"]
    assert [one["id"] for one in listed] == ["base"]


def test_nobody_between_holds_the_events_of_a_stream_back_or_keeps_them() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def made() -> Any:
        yield Event({"a": "é"}, id="job:0", name="one")

    async def stays() -> Any:
        await asyncio.Event().wait()

    unused: Any = None

    async def answered() -> int:
        """How many tasks it has left."""
        await EventResponse(made(), unused, stays, unused)({"type": "http"}, unused, send)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(answered()) == 0, "nobody waits any more for the client to leave"
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
    ("kind", "given", "said"),
    [
        ("json_schema", False, "x: missing; with type json_schema it has to be given."),
        ("text", True, "x: given with type text; leave it out, or say type json_schema."),
        ("json_object", True, "x: given with type json_object; leave it out, or say type json_schema."),
    ],
)
def test_a_schema_that_lacks_or_that_its_type_does_not_take_is_refused_as_that(
    kind: str, given: bool, said: str
) -> None:
    with pytest.raises(Refused) as refused:
        check_schema("x", kind, given=given)
    assert (refused.value.param, refused.value.message) == ("x", said)
    check_schema("x", kind, given=not given)


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
