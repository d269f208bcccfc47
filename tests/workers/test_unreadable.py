"""A message that cannot be read: one dead letter with its bytes, and kombu hands none of it to Celery."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Consumer
from kombu.pidbox import Mailbox
from redis.exceptions import ConnectionError as RedisConnectionError
from typer.testing import CliRunner

from stoker.broker import keys, letters
from stoker.broker.envelope import envelope
from stoker.celery_config import shared_config
from stoker.cli import app
from stoker.client import Client
from stoker.errors import InvalidRequest
from stoker.settings import Settings
from workers import unreadable
from workers.celery import transport
from workers.celery.transport import WorkerConnection
from workers.deliveries import Deliveries
from workers.unreadable import DeadMessages, Unreadable

QUEUE = keys.queue("m", "generate")
GARBAGE = [b"garbage", b"[]", b"{}", b"\xff", b"[" * 50_000, b"x" * 100_000]


def right(job_id: str = "job") -> bytes:
    made = json.loads(envelope(job_id, "generate", "m", QUEUE))
    made["properties"]["delivery_tag"] = f"{job_id}#1"
    return json.dumps(made).encode()


class Book:
    """Dead letters, in memory."""

    def __init__(self) -> None:
        self.found: list[Unreadable] = []

    def add(self, message: Unreadable) -> None:
        self.found.append(message)


@pytest.fixture
def deliveries() -> Deliveries:
    """Of a worker that may take over what others held for longer than a lease."""
    health: Any = SimpleNamespace(may_take_over=lambda: True)
    return Deliveries(health)


@pytest.fixture
def aside(deliveries: Deliveries) -> list[Unreadable]:
    book: Any = Book()
    deliveries.keep_dead(book)
    found: list[Unreadable] = book.found
    return found


def test_a_connection_that_was_made_before_decides_for_none_that_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kombu.transport.TRANSPORT_ALIASES, "redis", "kombu.transport.redis:Transport")
    monkeypatch.setitem(kombu.transport._transport_cache, "redis", kombu.transport.resolve_transport("redis"))
    transport.install()
    assert kombu.transport.get_transport_cls("redis") is transport.Transport


@pytest.fixture
def connection(broker: Settings, deliveries: Deliveries) -> Iterator[Connection]:
    """The worker's transport, as Celery configures it."""
    transport.install()
    config = shared_config(broker)
    options = config["broker_transport_options"] | {"polling_interval": 0.05}
    with WorkerConnection(config["broker_url"], transport_options=options, deliveries=deliveries) as made:
        yield made
        poller = made.transport.cycle.poller
    # kombu leaves it to the interpreter.
    poller.close()


class Inbox:
    """Consumes one queue; `deliver` may raise."""

    def __init__(self, connection: Connection, queue: str = QUEUE) -> None:
        self.connection = connection
        self.got: list[str] = []
        self.deliver: Callable[[Any], None] = lambda message: self.got.append(message.headers["id"])
        self.consumer = Consumer(
            connection.default_channel, [Queue(queue)], on_message=lambda message: self.deliver(message)
        )
        self.consumer.consume()


def drain(connection: Connection) -> None:
    """Take what is there."""
    with suppress(TimeoutError):
        while True:
            connection.drain_events(timeout=0.2)


@pytest.mark.parametrize("raw", GARBAGE, ids=lambda raw: repr(raw[:8]))
def test_what_cannot_be_read_is_dead_lettered_once_and_what_comes_behind_is_delivered(
    redis: Any, connection: Connection, aside: list[Unreadable], raw: bytes
) -> None:
    inbox = Inbox(connection)
    redis.lpush(keys.ready(QUEUE), raw)
    redis.lpush(keys.ready(QUEUE), right())
    drain(connection)
    assert inbox.got == ["job"]
    assert [(message.raw, message.queue) for message in aside] == [(raw, QUEUE)]
    assert redis.hkeys(keys.UNACKED) == [b"job#1"], "nobody holds the other"


def test_a_delivery_that_fails_is_dead_lettered_and_acknowledged(
    redis: Any, connection: Connection, aside: list[Unreadable]
) -> None:
    """With every error that kombu or Celery raises over it."""
    inbox = Inbox(connection)

    def fail(message: Any) -> None:
        raise KeyError("a defect")

    inbox.deliver = fail
    redis.lpush(keys.ready(QUEUE), right())
    drain(connection)
    assert ["a defect" in message.trouble for message in aside] == [True]
    assert not redis.exists(keys.UNACKED)


def test_a_delivery_that_fails_gives_its_place_in_the_lane_back(
    redis: Any, connection: Connection, aside: list[Unreadable], deliveries: Deliveries
) -> None:
    dropped: list[str] = []
    delivery: Any = SimpleNamespace(token="1", tag="job#1", queue=QUEUE, reject=lambda: dropped.append("job#1"))
    deliveries.add(delivery)
    inbox = Inbox(connection)

    def fail(message: Any) -> None:
        raise TypeError("a defect")

    inbox.deliver = fail
    redis.lpush(keys.ready(QUEUE), right())
    drain(connection)
    assert dropped == ["job#1"]


def test_the_brokers_own_trouble_is_no_messages_fault(
    redis: Any, connection: Connection, aside: list[Unreadable]
) -> None:
    inbox = Inbox(connection)

    def fail(message: Any) -> None:
        raise RedisConnectionError("gone")

    inbox.deliver = fail
    redis.lpush(keys.ready(QUEUE), right())
    with pytest.raises(RedisConnectionError):
        connection.drain_events(timeout=1)
    assert aside == []
    assert redis.hkeys(keys.UNACKED) == [b"job#1"], "its lease brings it elsewhere"


@pytest.mark.parametrize("raw", ["[]", "{}", "1", "[" * 50_000, '{"properties": 1}', "garbage"])
def test_a_control_message_that_cannot_be_read_is_left_out(
    redis: Any, connection: Connection, aside: list[Unreadable], raw: str
) -> None:
    box = Mailbox("box", type="fanout")
    heard: list[Any] = []
    node = box.Node("here", channel=connection.default_channel)
    node.listen(callback=lambda body, message: heard.append(body))
    drain(connection)
    assert redis.publish(f"{keys.PREFIX}/0.box.pidbox", raw) == 1, "the node listens there"
    drain(connection)
    assert aside == [], "nobody waits for it: it is no dead letter"
    box(connection).abcast("method")
    connection.drain_events(timeout=5)
    assert [body["method"] for body in heard] == ["method"]


HELD = {
    "no JSON": b"garbage",
    "no text": b"\xff",
    "no triple": b"[1]",
    "a tree": b"[" * 50_000,
    "no message": json.dumps(["x", "", QUEUE]).encode(),
    "no headers": json.dumps([{"properties": {"delivery_info": {}}}, "", QUEUE]).encode(),
    "no properties": json.dumps([{"headers": {}}, "", QUEUE]).encode(),
    "no queue": json.dumps([{"headers": {}, "properties": {"delivery_info": {}}}, "", "policy"]).encode(),
    "a list for a queue": json.dumps([{"headers": {}, "properties": {"delivery_info": {}}}, "", ["a"]]).encode(),
}


@pytest.mark.parametrize("what", HELD)
def test_an_entry_of_a_dead_worker_that_is_no_message_does_not_hold_up_the_others(
    redis: Any,
    connection: Connection,
    aside: list[Unreadable],
    what: str,
) -> None:
    redis.hset(keys.UNACKED, mapping={"bad": HELD[what], "job#1": json.dumps([json.loads(right()), "", QUEUE])})
    redis.zadd(f"{keys.PREFIX}unacked_index", {"bad": 1.0, "job#1": 2.0})
    connection.default_channel.qos.restore_visible(interval=1)
    assert [message.raw for message in aside] == [HELD[what]]
    assert redis.llen(keys.ready(QUEUE)) == 1
    assert not redis.exists(keys.UNACKED, f"{keys.PREFIX}unacked_index")


def test_the_message_of_a_worker_of_another_release_goes_back_as_it_was(
    redis: Any, connection: Connection, aside: list[Unreadable]
) -> None:
    queue, made = f"{QUEUE}.v9", json.loads(right())
    made["body"] = "in another form"
    redis.hset(keys.UNACKED, "job#1", json.dumps([made, "", queue]))
    redis.zadd(f"{keys.PREFIX}unacked_index", {"job#1": 1.0})
    connection.default_channel.qos.restore_visible(interval=1)
    assert json.loads(redis.lindex(keys.ready(queue), 0))["body"] == "in another form"
    assert aside == []


def test_a_letter_has_the_reason_and_the_bytes_and_expires(redis: Any, broker: Settings) -> None:
    dead, raw = DeadMessages(redis, "w@here"), b"\xff" * (2 * letters.KEPT)
    dead.add(Unreadable(raw, QUEUE, "it is no JSON"))
    dead.write(wait=0.0)
    with Client(settings=broker) as client:
        ((name, letter),) = client.dead().items()
        with pytest.raises(InvalidRequest, match="cannot be read"):
            client.retry(name)
    assert base64.b64decode(letter["message"]) == raw[: letters.KEPT]
    assert letter["bytes"] == len(raw)
    assert letter["history"][0]["trouble"] == "it is no JSON"
    assert 0 < redis.ttl(keys.DEAD) <= keys.DEAD_TTL


def test_the_same_message_again_is_the_same_letter(redis: Any) -> None:
    dead = DeadMessages(redis, "w@here")
    for number in (1, 2):
        raw = right().replace(b"job#1", f"job#{number}".encode())
        dead.add(Unreadable(raw, QUEUE, "x"))
    dead.add(Unreadable(right("other"), QUEUE, "x"))
    dead.write(wait=0.0)
    assert redis.hlen(keys.DEAD) == 2


def test_a_flood_of_messages_does_not_fill_the_broker(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreadable, "MOST", 3)
    dead = DeadMessages(redis, "w@here")
    for number in range(10):
        dead.add(Unreadable(b"%d" % number, QUEUE, "x"))
    dead.write(wait=0.0)
    assert redis.hlen(keys.DEAD) == 3


def test_what_the_broker_does_not_take_is_written_later_and_never_waited_for(
    redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unreadable, "WAITING", 2)

    def away(*_: Any) -> None:
        raise RedisConnectionError("gone")

    broker = SimpleNamespace(hlen=away)
    dead = DeadMessages(broker, "w@here")
    for number in range(2):
        dead.add(Unreadable(b"%d" % number, QUEUE, "x"))
    with pytest.raises(RedisConnectionError):
        dead.write(wait=0.0)
    for number in range(2, 5):
        dead.add(Unreadable(b"%d" % number, QUEUE, "x"))
    for call in ("hlen", "hexists", "pipeline", "time"):
        setattr(broker, call, getattr(redis, call))
    dead.write(wait=0.0)
    assert redis.hlen(keys.DEAD) == 3, "one was on its way and two could wait"


SPOILED = [b"garbage", b"{}", b"[]", b"\xff", b"1", b'{"kind": 1, "model": "m", "history": []}', b"[" * 50_000]


@pytest.mark.parametrize("spoiled", SPOILED, ids=lambda raw: repr(raw[:12]))
def test_a_letter_that_is_spoiled_hides_no_other(redis: Any, broker: Settings, spoiled: bytes) -> None:
    redis.hset(keys.DEAD, mapping={b"x": spoiled})
    dead = DeadMessages(redis, "w@here")
    dead.add(Unreadable(b"garbage", QUEUE, "x"))
    dead.write(wait=0.0)
    with Client(settings=broker) as client:
        found = client.dead()
    assert len(found) == 2
    assert found["x"]["message"] == base64.b64encode(spoiled[: letters.KEPT]).decode()


def test_the_command_line_shows_a_message_that_cannot_be_read(redis: Any, broker: Settings) -> None:
    dead = DeadMessages(redis, "w@here")
    dead.add(Unreadable(b"garbage", QUEUE, "it is no JSON"))
    dead.write(wait=0.0)
    redis.hset(keys.DEAD, b"\xff", b"spoiled")
    done = CliRunner().invoke(app, ["jobs", "dead", "--url", str(broker.url)], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"message  {QUEUE}" in done.output
    assert "cannot be read, says w@here (it is no JSON)" in done.output
    for raw in (b"garbage", b"spoiled"):
        assert f"{len(raw)} bytes, base64: {base64.b64encode(raw).decode()}" in done.output


def test_dropping_a_delivery_rejects_the_newest_of_its_tag(deliveries: Deliveries) -> None:
    rejected: list[str] = []

    def hold(name: str, tag: str) -> None:
        delivery: Any = SimpleNamespace(token=name, tag=tag, queue=QUEUE, reject=lambda: rejected.append(name))
        deliveries.add(delivery)

    for name, tag in (("older", "job#1"), ("newer", "job#1"), ("other", "x#1")):
        hold(name, tag)
    assert deliveries.drop("job#1")
    assert rejected == ["newer"]
    assert not deliveries.drop("unknown#1")
