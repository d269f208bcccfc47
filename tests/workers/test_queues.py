"""What a worker consumes follows what it serves, in the consumer's loop, also where there is no connection just now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from workers.capacity import Lanes
from workers.celery.queues import ConsumedQueues


class TaskConsumer:
    """Of kombu's consumer what is used here, with what it did."""

    def __init__(self, queues: list[Any]) -> None:
        self.queues = queues
        self.did: list[str] = []
        self.trouble: Exception | None = None

    def cancel_by_queue(self, queue: Any) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.did.append(f"cancel {queue.name}")
        self.queues.remove(queue)

    def consuming_from(self, name: str) -> bool:
        return any(queue.name == name for queue in self.queues)

    def add_queue(self, queue: Any) -> None:
        self.queues.append(queue)

    def consume(self) -> None:
        self.did.append(f"consume {', '.join(sorted(queue.name for queue in self.queues))}")


class Consumer:
    """Celery's, of queues `a` and `b`. `call_soon`: at once, unless a test says otherwise."""

    def __init__(self) -> None:
        self.app = Celery(broker="memory://", set_as_current=False)
        self.app.amqp.queues.select(["a", "b"])
        self.task_consumer: TaskConsumer | None = TaskConsumer(list(self.app.amqp.queues.consume_from.values()))
        self.call_soon: Callable[..., object] = lambda call, *given: call(*given)

    @property
    def selected(self) -> set[str]:
        return set(self.app.amqp.queues.consume_from)


@pytest.fixture
def consumer() -> Consumer:
    return Consumer()


@pytest.fixture
def queues(consumer: Consumer) -> ConsumedQueues:
    lanes = Lanes()
    lanes.configure({"embed": 1, "generate": 1}, {"embed": ["a"], "generate": ["b"]})
    made = ConsumedQueues(lanes, within=0.05)
    made.attach(consumer)
    return made


def test_what_is_not_served_any_more_is_cancelled_and_what_is_new_is_consumed(
    queues: ConsumedQueues, consumer: Consumer
) -> None:
    queues.serve({"embed": [], "generate": ["b", "c"]})
    assert consumer.selected == {"b", "c"}
    assert consumer.task_consumer is not None
    assert consumer.task_consumer.did == ["cancel a", "consume b, c"]


def test_what_does_not_change_asks_the_broker_for_nothing(queues: ConsumedQueues, consumer: Consumer) -> None:
    queues.serve({"embed": ["a"], "generate": ["b"]})
    assert consumer.task_consumer is not None
    assert consumer.task_consumer.did == []


def test_the_lanes_know_the_queues_before_there_is_a_consumer() -> None:
    lanes = Lanes()
    lanes.configure({"embed": 1}, {})
    ConsumedQueues(lanes).serve({"embed": ["c"]})
    assert lanes.kind_of("c") == "embed"


def test_a_consumer_without_a_connection_is_not_waited_for_and_finds_them_at_the_next(
    queues: ConsumedQueues, consumer: Consumer, caplog: pytest.LogCaptureFixture
) -> None:
    consumer.call_soon = lambda call, *given: None
    queues.serve({"embed": ["c"], "generate": []})
    assert "with the next connection" in caplog.text
    assert consumer.selected == {"c"}


@pytest.mark.parametrize("trouble", [OperationalError("gone"), OSError("gone")])
def test_a_connection_that_is_lost_meanwhile_does_not_keep_the_caller_waiting(
    queues: ConsumedQueues, consumer: Consumer, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    assert consumer.task_consumer is not None
    consumer.task_consumer.trouble = trouble
    with caplog.at_level(logging.WARNING):
        queues.serve({"embed": ["c"], "generate": []})
    assert [record.getMessage() for record in caplog.records] == [
        "the queues are changed with the next connection to the broker: gone"
    ], "and it was not waited for in vain"


def test_a_consumer_that_is_between_two_connections_has_nothing_to_change(
    queues: ConsumedQueues, consumer: Consumer, caplog: pytest.LogCaptureFixture
) -> None:
    consumer.task_consumer = None
    queues.serve({"embed": ["c"], "generate": []})
    assert not caplog.records
    assert consumer.selected == {"c"}


def test_after_a_lost_connection_the_new_consumer_follows(queues: ConsumedQueues, consumer: Consumer) -> None:
    other = Consumer()
    queues.attach(other)
    queues.serve({"embed": ["a"], "generate": []})
    assert (other.selected, consumer.selected) == ({"a"}, {"a", "b"})
