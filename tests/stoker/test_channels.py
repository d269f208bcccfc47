"""Readers of one event loop share a connection to the broker's channels; what is one's own trouble stays one's own."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from stoker import AsyncClient
from stoker.broker import keys
from stoker.client import channels
from stoker.client.channels import Channels, FellBehind, Listener
from stoker.contract import StreamToken
from tests.stoker.test_client_core import fake, server

__all__ = ["fake", "server"]

Replies = asyncio.Queue[Any]


class Connection:
    """A connection of redis-py to a broker that answers in the order of the commands."""

    socket_timeout = 10.0

    def __init__(self, broker: Broker) -> None:
        self._broker, self._replies = broker, Replies()
        self.names: set[bytes] = set()
        self.closed = False

    def pack_commands(self, commands: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
        return list(commands)

    async def send_packed_command(self, commands: list[Sequence[Any]]) -> None:
        try:
            await self._broker.sending.wait()
        except asyncio.CancelledError:
            self.lose()
            raise
        if self._broker.broken:
            raise RedisConnectionError("broken pipe")
        self._broker.sent.append(commands)
        for command, *names in commands:
            self._take(command, names)

    def _take(self, command: str, names: list[bytes]) -> None:
        if self._broker.refused & set(names):
            self._replies.put_nowait(NoPermissionError("no permissions"))
            return
        for name in names:
            (self.names.add if command == "SUBSCRIBE" else self.names.discard)(name)
            if self._broker.acknowledges:
                self._replies.put_nowait([command.lower().encode(), name, len(self.names)])

    def publish(self, name: bytes, data: bytes) -> None:
        if name in self.names:
            self._replies.put_nowait([b"message", name, data])

    async def read_response(self, *, timeout: float, push_request: bool) -> Any:
        reply = await self._replies.get()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def lose(self) -> None:
        self._replies.put_nowait(RedisConnectionError("connection closed by server"))


class PubSub:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def connect(self) -> None:
        await asyncio.sleep(0)
        if self._broker.away:
            raise RedisConnectionError("connection refused")
        self.connection = Connection(self._broker)
        self._broker.connections.append(self.connection)

    async def aclose(self) -> None:
        if hasattr(self, "connection"):
            self.connection.closed = True


class Broker:
    """Everything that one asks of redis-py's client here."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.sent: list[list[Sequence[Any]]] = []
        self.refused: set[bytes] = set()
        self.acknowledges, self.away, self.broken = True, False, False
        self.sending = asyncio.Event()
        self.sending.set()

    def pubsub(self, **options: object) -> PubSub:
        return PubSub(self)

    def publish(self, name: str, *data: bytes) -> None:
        for connection in self.connections:
            for one in data:
                connection.publish(name.encode(), one)

    @property
    def names(self) -> list[set[bytes]]:
        """What is subscribed to, of each connection that is open."""
        return [connection.names for connection in self.connections if not connection.closed]


def run(work: Callable[[Broker, Channels], Awaitable[None]]) -> None:
    async def main() -> None:
        broker = Broker()
        # A double of as much of redis-py's client as the channels use.
        given: Any = broker
        held = Channels(given)
        async with asyncio.timeout(20):
            await work(broker, held)
        await held.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def subscribed(held: Channels, *names: str) -> Listener:
    listener = held.listener()
    await listener.subscribe(*names)
    return listener


async def data_of(listener: Listener, count: int) -> list[bytes]:
    found = [await listener.get_message(10) for _ in range(count)]
    return [message["data"] for message in found if message is not None]


async def settled() -> None:
    """All that may run now has run."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_readers_share_a_connection_and_each_hears_its_own_channels_in_order() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        one, other, twin = await asyncio.gather(*(subscribed(held, name, "all") for name in ("a", "b", "a")))
        broker.publish("a", b"1", b"2")
        broker.publish("all", b"3")
        broker.publish("b", b"4")
        assert await data_of(one, 3) == await data_of(twin, 3) == [b"1", b"2", b"3"]
        assert await data_of(other, 2) == [b"3", b"4"]
        assert len(broker.connections) == 1
        assert len(broker.sent) == 1, "what several subscribe to at once goes out together"

    run(work)


def test_what_nobody_has_any_more_is_unsubscribed_and_the_last_reader_closes_the_connection() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        one, other = await subscribed(held, "a", "both"), await subscribed(held, "b", "both")
        await one.aclose()
        await settled()
        assert broker.names == [{b"b", b"both"}]
        await other.aclose()
        assert broker.names == []
        await subscribed(held, "c")
        assert broker.names == [{b"c"}]

    run(work)


def test_a_reader_that_is_slow_falls_behind_alone_and_what_waits_for_it_is_bounded() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        slow, quick = await subscribed(held, "a"), await subscribed(held, "a")
        sent = [b"%d" % number for number in range(channels.BACKLOG + 10)]
        heard = []
        for one in sent:
            broker.publish("a", one)
            heard += await data_of(quick, 1)
        assert heard == sent
        assert await data_of(slow, channels.BACKLOG) == sent[: channels.BACKLOG]
        # It has room now, and what came would be behind a gap.
        broker.publish("a", b"behind a gap")
        assert await data_of(quick, 1) == [b"behind a gap"]
        with pytest.raises(FellBehind):
            await slow.get_message(10)
        slow.doubt()
        await slow.aclose()
        again = await subscribed(held, "a")
        broker.publish("a", b"new")
        assert await data_of(again, 1) == await data_of(quick, 1) == [b"new"]
        assert len(broker.connections) == 1

    run(work)


def test_a_connection_that_is_lost_is_lost_for_all_and_made_again_once() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        readers = [await subscribed(held, name) for name in "ab"]
        broker.publish("a", b"before")
        broker.connections[0].lose()
        assert await data_of(readers[0], 1) == [b"before"]
        for reader in readers:
            with pytest.raises(RedisConnectionError, match="closed by server"):
                await reader.get_message(10)
            await reader.aclose()
        readers = list(await asyncio.gather(*(subscribed(held, name) for name in "ab")))
        broker.publish("b", b"after")
        assert await data_of(readers[1], 1) == [b"after"]
        assert len(broker.connections) == 2

    run(work)


def test_a_broker_that_is_away_is_an_error_for_all_who_wait_at_once() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        broker.away = True
        found = await asyncio.gather(*(subscribed(held, name) for name in "abc"), return_exceptions=True)
        assert [str(error) for error in found] == ["connection refused"] * 3
        broker.away = False
        await subscribed(held, "a")

    run(work)


@pytest.mark.parametrize("moment", ["while it is sent", "before it is acknowledged"])
def test_a_reader_that_is_cancelled_while_it_subscribes_hurts_nobody(moment: str) -> None:
    async def work(broker: Broker, held: Channels) -> None:
        first = await subscribed(held, "a")
        (broker.sending.clear if moment == "while it is sent" else lambda: setattr(broker, "acknowledges", False))()
        leaver = held.listener()
        leaving = asyncio.ensure_future(leaver.subscribe("b"))
        await settled()
        leaving.cancel()
        await asyncio.wait({leaving})
        await leaver.aclose()
        broker.sending.set()
        if not broker.acknowledges:
            broker.acknowledges = True
            broker.connections[0]._replies.put_nowait([b"subscribe", b"b", 2])  # noqa: SLF001
        await subscribed(held, "c")
        broker.publish("a", b"1")
        assert await data_of(first, 1) == [b"1"]
        assert broker.names == [{b"a", b"c"}]

    run(work)


def test_a_subscription_that_the_broker_refuses_is_refused_alone() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        first = await subscribed(held, "a")
        broker.refused = {b"secret"}
        found = await asyncio.gather(*(subscribed(held, name) for name in ("b", "secret", "c")), return_exceptions=True)
        assert [type(one) for one in found] == [Listener, NoPermissionError, Listener]
        broker.publish("a", b"1")
        assert await data_of(first, 1) == [b"1"]

    run(work)


def test_a_connection_that_acknowledges_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "socket_timeout", 0.01)

    async def work(broker: Broker, held: Channels) -> None:
        first = await subscribed(held, "a")
        broker.acknowledges = False
        with pytest.raises(RedisTimeoutError):
            await subscribed(held, "b")
        with pytest.raises(RedisTimeoutError):
            await first.get_message(10)
        broker.acknowledges = True
        await subscribed(held, "b")

    run(work)


def test_a_reader_whom_the_broker_does_not_answer_elsewhere_gets_another_connection() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        first, troubled = await subscribed(held, "a"), await subscribed(held, "b")
        troubled.doubt()
        await troubled.aclose()
        await subscribed(held, "b")
        assert broker.names == [{b"a"}, {b"b"}]
        broker.publish("a", b"1")
        assert await data_of(first, 1) == [b"1"], "who has the old one keeps it"
        await first.aclose()
        assert broker.names == [{b"b"}]

    run(work)


def test_a_refusal_is_that_of_the_subscription_that_was_sent_in_its_place() -> None:
    """Of several that go out together, the first with two channels: each of its acknowledgements is its own."""

    async def work(broker: Broker, held: Channels) -> None:
        broker.refused = {b"c"}
        await subscribed(held, "x")
        first, second, third = held.listener(), held.listener(), held.listener()
        asked = (first.subscribe("a", "b"), second.subscribe("c"), third.subscribe("d", "e"))
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in done] == [type(None), NoPermissionError, type(None)]
        assert len(broker.sent[-1]) == 3, "they went out together"

    run(work)


def test_who_waits_for_an_acknowledgement_hears_at_once_that_the_connection_is_lost() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        await subscribed(held, "a")
        broker.acknowledges = False
        asking = asyncio.ensure_future(subscribed(held, "b"))
        await settled()
        broker.connections[0].lose()
        with pytest.raises(RedisConnectionError, match="closed by server"):
            await asking

    run(work)


def test_nothing_is_sent_over_a_connection_that_was_lost_or_left() -> None:
    """It may be another's by then."""

    async def work(broker: Broker, held: Channels) -> None:
        def lost() -> None:
            broker.connections[-1].lose()

        def left() -> None:
            closing.append(asyncio.ensure_future(held.aclose()))

        closing = list[asyncio.Future[None]]()
        ends: tuple[Callable[[], None], ...] = (lost, left)
        for end in ends:
            await subscribed(held, "a")
            broker.sending.clear()
            asking = asyncio.ensure_future(subscribed(held, "b"))
            await settled()
            end()
            with pytest.raises(RedisConnectionError):
                await asking
            await settled()
            before = len(broker.sent)
            broker.sending.set()
            await settled()
            assert len(broker.sent) == before

    run(work)


def test_a_connection_over_which_nothing_can_be_sent_is_closed_for_all() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        first = await subscribed(held, "a")
        broker.broken = True
        with pytest.raises(RedisConnectionError, match="broken pipe"):
            await subscribed(held, "b")
        with pytest.raises(RedisConnectionError, match="broken pipe"):
            await first.get_message(10)
        await settled()
        assert broker.names == [], "nobody reads it any more"

    run(work)


def test_who_doubts_an_older_connection_takes_nobody_off_the_newer_one() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        first, troubled = await subscribed(held, "a"), await subscribed(held, "b")
        troubled.doubt()
        newer = await subscribed(held, "c")
        first.doubt()
        other = await subscribed(held, "d")
        assert broker.names == [{b"a", b"b"}, {b"c", b"d"}]
        for reader in (first, troubled, newer, other):
            await reader.aclose()
        assert broker.names == []

    run(work)


def test_nothing_holds_a_reader_that_has_left_nor_a_connection_that_was_closed() -> None:
    """Not the timer of its last wait, nor the list of those that are open: a client lives for months."""

    async def work(broker: Broker, held: Channels) -> None:
        reader = await subscribed(held, "a")
        waiting = asyncio.ensure_future(reader.get_message(3600))
        await settled()
        broker.publish("a", b"1")
        assert await waiting
        left: list[weakref.ref[Any]] = [weakref.ref(reader), weakref.ref(held.connection())]
        await reader.aclose()
        del reader, waiting
        await subscribed(held, "a")
        gc.collect()
        assert [one() for one in left] == [None, None]

    run(work)


def test_nothing_comes_for_as_long_as_was_said_also_after_longer_waits() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        reader = await subscribed(held, "a")
        for seconds in (10.0, 0.01, 0.05):
            soon = asyncio.ensure_future(reader.get_message(seconds))
            await settled()
            broker.publish("a", b"1")
            message = await soon
            assert message is not None
            assert message["data"] == b"1"
        loop = asyncio.get_running_loop()
        for seconds in (0.2, 0.01, 0.0):
            began = loop.time()
            async with asyncio.timeout(5):
                assert await reader.get_message(seconds) is None
            assert loop.time() - began >= seconds - 0.001

    run(work)


def test_a_client_that_closes_ends_those_who_listen() -> None:
    async def work(broker: Broker, held: Channels) -> None:
        reader = await subscribed(held, "a")
        soon = asyncio.ensure_future(reader.get_message(10))
        await settled()
        await held.aclose()
        with pytest.raises(RedisConnectionError, match="the client was closed"):
            await soon
        assert broker.names == []

    run(work)


COUNT = 3 * channels.BACKLOG


def put(server: Any, job_id: str, index: int) -> None:
    """As a worker publishes a token."""
    token = StreamToken(index=index, token_id=1, text="x", logit=0.0, logprob=-1.0, probability=1.0)
    pipeline = server.pipeline()
    pipeline.xadd(keys.stream(job_id), {"entry": token.model_dump_json()}, id=keys.entry_id(index))
    pipeline.expire(keys.stream(job_id), 60)
    pipeline.publish(keys.channel(job_id), token.model_dump_json())
    pipeline.execute()


@asynccontextmanager
async def two_readers(server: Any) -> Any:
    """Of one client: the streams of two jobs, of which both have begun, and the ids of the jobs."""
    async with AsyncClient() as client:
        jobs = [await client.generate("x", model="smol") for _ in range(2)]
        streams = [job.stream(timeout=20, cancel_on_close=False) for job in jobs]
        for job, stream in zip(jobs, streams, strict=True):
            put(server, job.id, 0)
            assert (await anext(stream)).index == 0
        yield streams, [job.id for job in jobs]
        for stream in streams:
            await stream.aclose()


def listening(server: Any) -> list[Any]:
    """Connections that wait for what is published."""
    return [client for client in server.client_list() if client["sub"] != "0"]


@pytest.mark.usefixtures("fake")
def test_streams_of_a_client_share_one_connection_and_leave_none(server: Any) -> None:
    async def main() -> None:
        async with two_readers(server) as (streams, ids):
            for index in range(1, 4):
                for job_id, stream in zip(ids, streams, strict=True):
                    put(server, job_id, index)
                    assert (await anext(stream)).index == index
            assert [int(client["sub"]) for client in listening(server)] == [4]
            for stream in streams:
                await stream.aclose()
            async with asyncio.timeout(10):
                while listening(server):
                    await asyncio.sleep(0.001)

    asyncio.run(main())


@pytest.mark.usefixtures("fake")
def test_every_stream_goes_on_without_a_gap_where_the_connection_is_cut(server: Any) -> None:
    async def main() -> None:
        async with two_readers(server) as (streams, ids):
            for client in listening(server):
                server.client_kill_filter(_id=client["id"])
            for index in range(1, 4):
                for job_id in ids:
                    put(server, job_id, index)
            for stream in streams:
                assert [(await anext(stream)).index for _ in range(3)] == [1, 2, 3]

    asyncio.run(main())


@pytest.mark.usefixtures("fake")
def test_a_slow_reader_gets_every_token_and_the_other_is_not_held_up(server: Any) -> None:
    async def main() -> None:
        async with two_readers(server) as ((slow, quick), ids):
            for index in range(1, COUNT):
                put(server, ids[0], index)
            put(server, ids[1], 1)
            assert (await anext(quick)).index == 1
            assert [(await anext(slow)).index for _ in range(1, COUNT)] == list(range(1, COUNT))

    asyncio.run(main())
