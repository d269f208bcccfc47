"""A connection that listened to a job serves the next reader, and no reader takes what was another's."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from stoker import AsyncClient, Client
from stoker.broker import keys
from stoker.client import asynchronously, listeners
from stoker.client.blocking import Connections
from stoker.client.following import Follower
from stoker.client.listeners import Listeners
from stoker.contract import StreamToken
from stoker.errors import JobCancelled, JobTimeout
from stoker.settings import Settings
from tests.stoker.test_client_core import fake, server

__all__ = ["fake", "server"]


def listening(server: Any) -> list[int]:
    """The broker's numbers of the connections whose last word was on channels."""
    return sorted(int(each["id"]) for each in server.client_list() if each["cmd"].endswith("subscribe"))


def follow_to_the_end(client: Client) -> None:
    job = client.generate("x", model="smol")
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=30)


def test_the_next_reader_has_the_connection_of_the_last(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        follow_to_the_end(client)
        first = listening(server)
        follow_to_the_end(client)
        assert listening(server) == first
        assert len(first) == 1
    assert listening(server) == []


@pytest.mark.usefixtures("fake")
def test_the_next_reader_of_an_event_loop_has_the_connection_of_the_last(server: Any) -> None:
    async def twice() -> list[list[int]]:
        found = []
        async with AsyncClient() as client:
            for _ in range(2):
                job = await client.generate("x", model="smol")
                await job.cancel()
                with pytest.raises(JobCancelled):
                    await job.result(timeout=30)
                found.append(listening(server))
        return found

    first, second = asyncio.run(twice())
    assert first == second
    assert len(first) == 1
    assert listening(server) == []


def test_a_reader_that_gave_up_leaves_no_connection(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        job = client.generate("x", model="smol")
        with pytest.raises(JobTimeout):
            job.result(timeout=0.05)
        assert listening(server) == []


def test_what_was_said_of_another_job_is_not_this_ones(fake: Callable[[], Client], server: Any) -> None:
    follower = Follower[StreamToken](Settings(), "this")
    rest = json.dumps({"status": "REVOKED", "result": None}).encode()
    for channel in (keys.result("other"), keys.channel("other"), keys.channel("this")):
        assert follower.heard({"channel": channel.encode(), "data": rest}) == []
        assert follower.outcome is None
    follower.heard({"channel": keys.result("this").encode(), "data": rest})
    assert follower.outcome is not None


def test_a_connection_that_fails_when_it_is_given_back_is_closed(broker: Settings, server: Any) -> None:
    connections = Connections(broker)
    listener = connections.listener()
    listener.subscribe("channel")
    opened: Any = listener.connection
    opened.retry.update_retries(0)
    opened.disconnect()
    opened.port = 1
    connections.leave(listener, at_the_end=True)
    assert connections.listener() is not listener
    connections.close()


def test_what_a_client_that_was_closed_kept_does_not_come_back(broker: Settings) -> None:
    connections = Connections(broker)
    listener = connections.listener()
    listener.subscribe("channel")
    connections.leave(listener, at_the_end=True)
    connections.close()
    assert connections.listener() is not listener
    connections.close()


def test_what_an_asyncio_client_that_was_closed_kept_is_closed(broker: Settings) -> None:
    async def kept() -> Any:
        connections = asynchronously.Connections(broker)
        listener = connections.listener()
        await listener.subscribe("channel")
        await connections.leave(listener, at_the_end=True)
        await connections.aclose()
        return listener

    assert asyncio.run(kept()).connection is None


def test_no_more_are_kept_than_a_few() -> None:
    kept: Listeners[int] = Listeners()
    assert [kept.keep(number) for number in range(listeners.MOST + 1)] == [True] * listeners.MOST + [False]
    assert kept.take() == listeners.MOST - 1, "the last one is the likeliest to be alive"


def test_a_process_that_was_forked_takes_no_connection_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: Listeners[str] = Listeners()
    kept.keep("the parent's")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert kept.take() is None
    kept.keep("the child's")
    assert kept.take() == "the child's"
