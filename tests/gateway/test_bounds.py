"""What the gateway shows to whom, what a proxy is asked to leave alone, and what is never held in memory."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stoker.gateway import batch_lines, listing
from stoker.gateway.batch_lines import lines_of
from stoker.gateway.errors import Refused
from stoker.gateway.events import Event, EventResponse
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
