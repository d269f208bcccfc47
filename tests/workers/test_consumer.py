"""A channel for each lane, on a real broker: nobody's next job waits for another lane's BRPOP.

Each BRPOP may wait for an hour here: a lane that needed one to run out would never get its job.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from kombu.asynchronous import Hub
from kombu.entity import Queue

from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.broker.envelope import envelope
from stoker.celery_config import shared_config
from stoker.settings import Settings
from workers.capacity import Lanes
from workers.celery import transport
from workers.celery.consumer import LaneConsumer
from workers.celery.transport import WorkerConnection
from workers.context import WorkerContext
from workers.deliveries import Deliveries, Health

LIMITS = {"generate": 2, "train": 1}
QUEUES = {"generate": ["stoker.a.generate", "stoker.b.generate"], "train": ["stoker.a.train"]}
TRAIN = QUEUES["train"][0]
HOUR = 3600
NAME = "w@host/1a2b3c4d"


class Worker:
    """What a worker has of Celery and kombu: a connection, its loop, and the lanes' consumer. Jobs end when asked."""

    def __init__(self, settings: Settings, lanes: Lanes) -> None:
        self.redis, self.lanes = connect(settings), lanes
        options = shared_config(settings)["broker_transport_options"]
        self.deliveries = Deliveries(Health(settings.lease))
        self.connection = WorkerConnection(
            settings.address.celery, transport_options=options, deliveries=self.deliveries
        )
        self.connection.transport.brpop_timeout = HOUR
        queues = [Queue(name, routing_key=name) for names in QUEUES.values() for name in names]
        self.consumer = LaneConsumer(
            self.connection, queues, accept=["json"], on_message=self._take, lanes=lanes, worker=NAME
        )
        self.hub = Hub()
        self.lanes.wake = lambda: self.hub.call_soon(lambda: None)
        self.connection.register_with_event_loop(self.hub)
        self.consumer.consume()
        self.taken: list[Any] = []

    def _kind(self, message: Any) -> str:
        return self.lanes.kind_of(message.delivery_info["routing_key"]) or ""

    def _take(self, message: Any) -> None:
        self.lanes.enter(self._kind(message))
        self.taken.append(message)

    def send(self, queue: str, job: str = "job", only: str | None = None) -> None:
        """`only`: the worker that alone may take it."""
        _, model, kind = queue.split(".")
        message = envelope(f"{model}-{kind}-{job}", kind, model, queue)
        tagged = message.replace('"delivery_tag": ""', f'"delivery_tag": "{model}-{kind}-{job}#1"')
        self.redis.lpush(keys.placed(queue, only) if only else keys.ready(queue), tagged)

    def end(self, message: Any) -> None:
        message.ack()
        self.lanes.leave(self._kind(message))

    def turn_until(self, condition: Any) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            self.hub.run_once()

    def blocked(self) -> int:
        """BRPOPs that wait in the broker now."""
        return sum("b" in client["flags"] for client in self.redis.client_list())

    def disconnect(self) -> None:
        if not self.connection.connected:
            return
        # What closes reads the answer of a BRPOP that is under way: there will be none for an hour.
        for channel in self.connection.transport.channels:
            channel._in_poll = None
        self.connection.close()
        self.hub.close()


@pytest.fixture
def lanes() -> Lanes:
    made = Lanes()
    made.configure(LIMITS, QUEUES)
    return made


@pytest.fixture
def worker(broker: Settings, lanes: Lanes) -> Iterator[Worker]:
    transport.install()
    running = Worker(broker, lanes)
    yield running
    running.disconnect()
    running.redis.close()


def taken(worker: Worker) -> Counter[str]:
    return Counter(message.delivery_info["routing_key"] for message in worker.taken)


def test_a_lane_that_has_room_again_gets_its_next_job_while_the_others_wait(worker: Worker) -> None:
    for number in range(5):
        worker.send(TRAIN, f"{number}")
    for number in range(5):
        worker.turn_until(lambda wanted=number + 1: len(worker.taken) == wanted)
        assert worker.redis.llen(keys.ready(TRAIN)) == 4 - number, "a full lane takes no more"
        worker.end(worker.taken[-1])
    worker.turn_until(lambda: worker.blocked() == 2)
    worker.send("stoker.b.generate")
    worker.turn_until(lambda: taken(worker)["stoker.b.generate"] == 1)


def test_a_full_lane_asks_for_nothing_and_the_others_go_on(worker: Worker) -> None:
    for number in range(3):
        worker.send(TRAIN, f"{number}")
    worker.turn_until(lambda: len(worker.taken) == 1)
    for number in range(2):
        worker.send("stoker.a.generate", f"{number}")
        worker.turn_until(lambda wanted=number + 1: taken(worker)["stoker.a.generate"] == wanted)
    worker.send("stoker.b.generate")
    assert taken(worker) == {TRAIN: 1, "stoker.a.generate": 2}, "both queues of a kind share its lane"
    assert worker.redis.llen(keys.ready("stoker.b.generate")) == 1
    assert worker.redis.llen(keys.ready(TRAIN)) == 2
    assert worker.blocked() == 0


def test_what_is_for_this_worker_alone_comes_first_and_what_is_for_another_does_not_come(worker: Worker) -> None:
    queue = "stoker.a.generate"
    worker.send(queue, "other", only="v@host/5e6f7a8b")
    worker.send(queue, "any")
    worker.send(queue, "own", only=NAME)
    worker.turn_until(lambda: len(worker.taken) == 2)
    assert [message.headers["id"] for message in worker.taken] == ["a-generate-own", "a-generate-any"]
    assert taken(worker) == {queue: 2}, "they are jobs of the one queue"
    worker.send(queue, "late", only=NAME)
    worker.send(TRAIN)
    worker.turn_until(lambda: taken(worker)[TRAIN] == 1)
    assert worker.redis.llen(keys.placed(queue, NAME)) == 1, "a full lane takes none"
    worker.end(worker.taken[0])
    worker.turn_until(lambda: taken(worker)[queue] == 3)
    worker.redis.delete(keys.placed(queue, "v@host/5e6f7a8b"))


def test_many_jobs_through_full_lanes_leave_no_key(worker: Worker) -> None:
    before: set[bytes] = set()
    for number in range(30):
        worker.send(TRAIN, f"{number}")
        worker.turn_until(lambda wanted=number + 1: len(worker.taken) == wanted)
        worker.end(worker.taken[-1])
        before = before or set(worker.redis.keys())
        assert set(worker.redis.keys()) == before


def test_a_lane_whose_connection_was_dropped_while_it_was_full_gets_its_next_job(worker: Worker) -> None:
    worker.send(TRAIN, "first")
    worker.turn_until(lambda: worker.taken)
    worker.send(TRAIN, "second")
    channel = worker.consumer.channels["train"]
    channel.client.connection.disconnect()
    worker.end(worker.taken[0])
    worker.turn_until(lambda: len(worker.taken) == 2)


def test_a_lane_that_shrinks_while_it_asks_takes_what_comes_and_then_no_more(worker: Worker, lanes: Lanes) -> None:
    worker.send("stoker.a.generate", "first")
    worker.turn_until(lambda: worker.taken and worker.blocked() == 2)
    lanes.shrink("generate")
    assert not lanes.has_room("generate")
    worker.send("stoker.a.generate", "second")
    worker.turn_until(lambda: len(worker.taken) == 2)
    worker.send("stoker.a.generate", "third")
    worker.end(worker.taken[0])
    worker.send(TRAIN)
    worker.turn_until(lambda: taken(worker)[TRAIN] == 1)
    assert worker.redis.llen(keys.ready("stoker.a.generate")) == 1
    worker.end(worker.taken[1])
    worker.turn_until(lambda: taken(worker)["stoker.a.generate"] == 3)


def test_a_new_connection_asks_for_no_job_of_a_lane_that_is_still_full(
    worker: Worker, broker: Settings, lanes: Lanes
) -> None:
    worker.send(TRAIN, "first")
    worker.send(TRAIN, "second")
    worker.turn_until(lambda: worker.taken)
    worker.disconnect()
    again = Worker(broker, lanes)
    again.send("stoker.a.generate")
    again.turn_until(lambda: again.taken)
    assert taken(again) == {"stoker.a.generate": 1}
    worker.end(worker.taken[0])
    again.turn_until(lambda: taken(again)[TRAIN] == 1)
    again.disconnect()
    again.redis.close()
    worker.consumer.channels["train"].close()


def test_what_all_lanes_hold_is_renewed_and_goes_back_when_the_worker_stops(worker: Worker) -> None:
    for queue in (TRAIN, "stoker.a.generate", "stoker.b.generate"):
        worker.send(queue)
    worker.turn_until(lambda: len(worker.taken) == 3)
    worker.end(worker.taken[0])
    held = {message.delivery_tag for message in worker.taken[1:]}
    assert worker.consumer.held_tags() == held
    worker.deliveries.go_back = True
    worker.disconnect()
    queues = [TRAIN, "stoker.a.generate", "stoker.b.generate"]
    assert sum(worker.redis.llen(keys.ready(queue)) for queue in queues) == 2
    assert not worker.redis.exists(keys.UNACKED)


def test_a_queue_is_given_up_and_taken_up_by_name(worker: Worker) -> None:
    """`celery control cancel_consumer`, and Flower's button."""
    worker.consumer.cancel_by_queue(TRAIN)
    assert not worker.consumer.consuming_from(TRAIN)
    worker.send(TRAIN)
    worker.send("stoker.a.generate")
    worker.turn_until(lambda: worker.taken)
    assert worker.redis.llen(keys.ready(TRAIN)) == 1
    worker.consumer.add_queue(Queue(TRAIN, routing_key=TRAIN))
    worker.consumer.consume()
    worker.turn_until(lambda: taken(worker)[TRAIN] == 1)


def test_a_queue_that_belongs_to_no_lane_has_the_connections_own_channel(worker: Worker) -> None:
    worker.consumer.add_queue(Queue("stoker.other", routing_key="stoker.other"))
    worker.consumer.consume()
    assert worker.consumer.channel_of("stoker.other") is worker.connection.default_channel
    worker.consumer.cancel()
    assert not worker.consumer.consuming_from("stoker.other")


def test_what_celery_makes_knows_the_context_of_its_app(broker: Settings) -> None:
    """The connections that it consumes on, their copies and channels, and its consumers: nothing is a global."""
    transport.install()
    app = Celery("x", amqp="workers.celery.consumer:LaneAMQP")
    app.conf.update(shared_config(broker))
    app.context = context = WorkerContext(broker)
    with app.connection_for_read() as connection, connection.clone() as copy:
        for made in (connection, copy):
            assert isinstance(made, WorkerConnection)
            channel: Any = made.default_channel
            assert made.deliveries is channel.deliveries is context.deliveries
        assert app.amqp.TaskConsumer(connection.default_channel, queues=[]).lanes is context.lanes
        pollers = [made.transport.cycle.poller for made in (connection, copy)]
    # kombu leaves it to the interpreter.
    for poller in pollers:
        poller.close()


@pytest.mark.parametrize("login", ["hunter2", ":hunter2", "me:hunter2", ""])
def test_a_login_without_a_colon_is_not_shown_either(login: str) -> None:
    url = f"redis://{login}{'@' if login else ''}host:7000/1"
    connection = WorkerConnection(url, deliveries=Deliveries(Health(1)))
    shown = connection.as_uri()
    assert "hunter2" not in f"{shown} {connection!r} {connection.clone().as_uri()}"
    assert "host:7000/1" in shown
