"""How answers go out: what is written together is sent together, and a client that takes nothing counts as gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from stoker.gateway import events, protocol
from stoker.gateway.command import server
from stoker.gateway.errors import Refused
from stoker.gateway.events import Event, EventResponse
from stoker.gateway.protocol import HoldingTransport
from tests import hurried


class Kept(asyncio.Transport):
    """It keeps what it is given."""

    def __init__(self, own: socket.socket | None = None) -> None:
        super().__init__({"socket": own})
        self.sent: list[bytes] = []
        self.closed_behind: list[bytes] | None = None
        self.closed = asyncio.Event()

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed_behind is not None

    def close(self) -> None:
        self.closed_behind = list(self.sent)
        self.closed.set()

    def abort(self) -> None: ...


def test_what_one_turn_writes_goes_out_together_in_order() -> None:
    async def run() -> list[bytes]:
        kept = Kept()
        holding = HoldingTransport(kept, asyncio.get_running_loop())
        for data in (b"a", b"b"):
            holding.write(data)
        assert kept.sent == []
        await asyncio.sleep(0)
        holding.write(b"c")
        await asyncio.sleep(0)
        return list(kept.sent)

    assert asyncio.run(run()) == [b"ab", b"c"]


def test_much_is_not_held_so_that_a_slow_client_is_noticed() -> None:
    async def run() -> list[bytes]:
        kept = Kept()
        holding = HoldingTransport(kept, asyncio.get_running_loop())
        holding.write(b"a")
        holding.write(b"b" * protocol.MOST_HELD)
        return list(kept.sent)

    (sent,) = asyncio.run(run())
    assert sent == b"a" + b"b" * protocol.MOST_HELD


def test_a_connection_is_closed_behind_what_was_written() -> None:
    async def run() -> list[bytes] | None:
        kept = Kept()
        holding = HoldingTransport(kept, asyncio.get_running_loop())
        holding.write(b"a")
        holding.close()
        return kept.closed_behind

    assert asyncio.run(run()) == [b"a"]


async def _waits(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


def _connected(kept: Kept) -> protocol.TimedProtocol:
    """A connection with a request that is not answered yet."""
    config = server(_waits).config
    made = protocol.TimedProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    made.connection_made(kept)
    made.data_received(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
    return made


def test_a_connection_is_closed_once_nothing_was_taken_for_a_while() -> None:
    async def run(kept: Kept) -> float:
        """Seconds until then."""
        connection = _connected(kept)
        for _ in range(3):
            connection.pause_writing()
            await asyncio.sleep(protocol.TAKEN_WITHIN - 1)
            connection.resume_writing()
            await asyncio.sleep(protocol.TAKEN_WITHIN)
        assert not kept.is_closing(), "what waited was taken each time"
        connection.pause_writing()
        paused = asyncio.get_running_loop().time()
        await kept.closed.wait()
        took = asyncio.get_running_loop().time() - paused
        connection.connection_lost(None)
        return took

    with socket.socket() as own:
        assert hurried.run(run(Kept(own))) == protocol.TAKEN_WITHIN


def test_a_connection_that_is_lost_is_not_waited_for() -> None:
    async def run(kept: Kept) -> bool:
        connection = _connected(kept)
        connection.pause_writing()
        connection.connection_lost(ConnectionResetError())
        await asyncio.sleep(protocol.TAKEN_WITHIN + 1)
        return kept.is_closing()

    with socket.socket() as own:
        assert not hurried.run(run(Kept(own)))


class Client:
    """An HTTP client that takes `most` messages and then no more. `left`: how often its job was left."""

    def __init__(self, most: int) -> None:
        self.taken: list[dict[str, Any]] = []
        self.left = 0
        self._most = most

    async def send(self, message: Any) -> None:
        if len(self.taken) == self._most:
            await asyncio.Event().wait()
        self.taken.append(message)

    async def gone(self) -> None:
        await asyncio.Event().wait()

    async def leave(self) -> None:
        self.left += 1

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.taken if message["type"] == "http.response.body"]

    def answer(self, found: AsyncGenerator[Event]) -> None:
        """Raises what the response ends with."""
        response = EventResponse(found, _failed, self.gone, self.leave)
        asyncio.run(asyncio.wait_for(response({}, _nothing, self.send), 10))


def _failed(refused: Refused) -> Iterator[Event]:
    yield Event("failed")


async def _nothing() -> Any:
    raise AssertionError("nothing is received")


async def _events(*names: str, error: Refused | None = None, ends: bool = True) -> AsyncGenerator[Event]:
    for name in names:
        yield Event(name)
    if error is not None:
        raise error
    if not ends:
        await asyncio.Event().wait()


@pytest.mark.parametrize("most", [0, 1, 2, 3], ids=["the status", "an event", "the last event", "the end"])
def test_a_client_that_takes_nothing_any_more_is_gone_wherever_the_answer_is(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SLOW", 0.01)
    client = Client(most)
    with pytest.raises(Refused) as caught:
        client.answer(_events("one", "two"))
    assert (caught.value.status, client.left, len(client.taken)) == (499, 1, most)


@pytest.mark.parametrize("most", [2, 3], ids=["the error", "the end"])
def test_a_client_that_takes_no_error_is_gone_too(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SLOW", 0.01)
    client = Client(most)
    with pytest.raises(Refused) as caught:
        client.answer(_events("one", error=Refused(500, "it failed.", code="job_failed")))
    assert (caught.value.status, client.left) == (499, 1)


def test_a_client_that_takes_no_comment_is_gone_and_gets_none_while_an_event_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "SLOW", 0.05)
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.001)
    silent = Client(most=4)
    with pytest.raises(Refused):
        silent.answer(_events("one", ends=False))
    assert silent.bodies == [Event("one").encode(), events.COMMENT, events.COMMENT]
    waits = Client(most=2)
    with pytest.raises(Refused):
        waits.answer(_events("one", "two"))
    assert waits.bodies == [Event("one").encode()]


def test_an_answer_without_events_has_a_status_and_an_end() -> None:
    client = Client(most=9)
    client.answer(_events())
    assert [message["type"] for message in client.taken] == ["http.response.start", "http.response.body"]
    assert client.taken[-1]["more_body"] is False


class Watch(Client):
    """It notes when it took what."""

    def __init__(self, most: int = 99) -> None:
        super().__init__(most)
        self.times: list[tuple[float, str]] = []

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "http.response.body":
            self.times.append((asyncio.get_running_loop().time(), message["body"].decode()))


def test_a_stream_that_is_kept_alive_is_silent_for_no_longer_than_was_said() -> None:
    """Counted from what was sent last, of any kind, and not from one look at the clock to the next."""

    async def now_and_then() -> AsyncGenerator[Event]:
        for seconds in (0.0, 0.9, 2.5, 0.5):
            await asyncio.sleep(seconds * events.KEEP_ALIVE)
            yield Event("said")

    watch = Watch()
    hurried.run(EventResponse(now_and_then(), _failed, watch.gone, watch.leave)({}, _nothing, watch.send))
    said, comment = Event("said").encode().decode(), events.COMMENT.decode()
    times = [(round(time / events.KEEP_ALIVE, 2), body) for time, body in watch.times]
    kept = [(1.9, comment), (2.9, comment)]
    assert times == [(0.0, said), (0.9, said), *kept, (3.4, said), (3.9, said), (3.9, "")]


@pytest.mark.parametrize(
    ("doubtful", "comments"), [(0.0, 3), (2.5, 1), (9.0, 0)], ids=["none", "a while", "to the end"]
)
def test_no_comment_begins_an_answer_that_may_yet_be_an_error_with_a_status(doubtful: float, comments: int) -> None:
    async def late() -> AsyncGenerator[Event]:
        await asyncio.sleep(3.5 * events.KEEP_ALIVE)
        yield Event("one")

    def in_doubt() -> bool:
        return asyncio.get_running_loop().time() < doubtful * events.KEEP_ALIVE

    watch = Watch()
    hurried.run(EventResponse(late(), _failed, watch.gone, watch.leave, in_doubt)({}, _nothing, watch.send))
    assert [body for _, body in watch.times].count(events.COMMENT.decode()) == comments


def test_an_answer_that_has_begun_is_kept_alive_in_any_doubt() -> None:
    async def begun() -> AsyncGenerator[Event]:
        yield Event("one")
        await asyncio.sleep(2.5 * events.KEEP_ALIVE)

    watch = Watch()
    hurried.run(EventResponse(begun(), _failed, watch.gone, watch.leave, lambda: True)({}, _nothing, watch.send))
    assert [body for _, body in watch.times].count(events.COMMENT.decode()) == 2


@pytest.mark.parametrize("before", [0.0, 0.5, 20.0], ids=["at once", "before a comment", "behind comments"])
def test_a_client_has_a_whole_while_to_read_what_was_written(before: float) -> None:
    async def two() -> AsyncGenerator[Event]:
        yield Event("one")
        await asyncio.sleep(before * events.KEEP_ALIVE)
        ready.append(asyncio.get_running_loop().time())
        yield Event("two")

    async def slowly() -> float:
        """How long it took."""

        async def send(message: Any) -> None:
            if b"two" in message.get("body", b""):
                await asyncio.Event().wait()

        watch = Watch()
        with pytest.raises(Refused):
            await EventResponse(two(), _failed, watch.gone, watch.leave)({}, _nothing, send)
        assert watch.left == 1
        return asyncio.get_running_loop().time() - ready[0]

    ready: list[float] = []
    assert events.SLOW <= hurried.run(slowly()) <= events.SLOW + events.KEEP_ALIVE
