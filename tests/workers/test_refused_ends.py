"""A broker that refuses the end of a delivery: its slot is free, and its message comes back with its lease."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, OutOfMemoryError, ReadOnlyError, RedisError

from stoker.broker import keys
from stoker.settings import Settings
from tests.workers.test_clock import LEASE, QUEUE, deliver, health, qos, sweep
from workers import clock
from workers.celery.lanes import LaneRequest
from workers.context import WorkerContext

__all__ = ["health", "qos"]

REFUSALS = (ReadOnlyError("replica"), NoPermissionError("zrem"), OutOfMemoryError("full"), RedisConnectionError("gone"))
ENDS: dict[str, Callable[[Any], None]] = {
    "ack": lambda qos: qos.ack("job#1"),
    "reject": lambda qos: qos.reject("job#1", requeue=True),
    "drop": lambda qos: qos.reject("job#1"),
}


def _refusing(error: Exception) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse


def _held_here(qos: Any) -> set[str]:
    """What `LaneConsumer.held_tags` renews."""
    return {tag for tag in qos._delivered if tag not in qos._dirty}


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("end", ENDS)
def test_a_message_whose_end_is_refused_is_held_by_nobody_and_comes_back_with_its_lease(
    redis: Any, qos: Any, monkeypatch: pytest.MonkeyPatch, end: str, error: RedisError
) -> None:
    deliver(qos)
    with monkeypatch.context() as patched:
        patched.setattr("workers.clock.let_go", _refusing(error))
        patched.setattr("kombu.transport.redis.QoS.reject", _refusing(error))
        ENDS[end](qos)
    assert _held_here(qos) == set(), "else its lease is renewed for as long as the worker lives"
    assert redis.hkeys(keys.UNACKED) == [b"job#1"]
    redis.zadd(keys.LEASES, {"job#1": clock.now(redis) - LEASE - 1})
    sweep(qos)
    assert redis.llen(keys.ready(QUEUE)) == 1
    assert not redis.exists(keys.UNACKED)


@pytest.fixture
def forbid(redis: Any) -> Iterator[Callable[[str], None]]:
    """The broker refuses this command from now on."""
    yield lambda command: redis.execute_command("ACL", "SETUSER", "default", f"-{command}")
    redis.execute_command("ACL", "SETUSER", "default", "+@all")


@pytest.mark.parametrize("command", ["lpush", "zrem", "hdel", "watch"])
def test_a_message_whose_requeueing_the_broker_forbids_in_any_part_is_where_it_was(
    redis: Any, qos: Any, forbid: Callable[[str], None], command: str
) -> None:
    deliver(qos)
    forbid(command)
    qos.reject("job#1", requeue=True)
    assert redis.hkeys(keys.UNACKED) == [b"job#1"]
    assert redis.zrange(keys.LEASES, 0, -1) == [b"job#1"]


def test_a_message_goes_back_though_kombus_table_of_queues_cannot_be_read(redis: Any, qos: Any) -> None:
    """kombu would take it off what is held, and put it back nowhere."""
    redis.set(f"{keys.PREFIX}_kombu.binding.celery", "of another program", ex=60)
    deliver(qos, "celery")
    qos.channel.qos.reject("job#1", requeue=True)
    assert redis.llen(keys.ready(QUEUE)) == 1
    back = json.loads(redis.lindex(keys.ready(QUEUE), 0))
    assert back["headers"]["redelivered"] is True
    assert back["properties"]["delivery_info"]["redelivered"] is True


@pytest.fixture
def request_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], Any]:
    """A request in a lane of one slot, whose end raises."""
    context = WorkerContext(Settings())
    context.lanes.configure({"train": 1}, {"train": ["stoker.a.train"]})
    base, errors = LaneRequest.__mro__[1], list[Exception]()

    def begin(self: Any, *_: Any, **__: Any) -> None:
        self._type, self._request_dict, self._id = "stoker.train", {}, "job"
        self._connection_errors = ()
        self._on_ack = self._on_reject = _refusing(errors[0])
        self._message = SimpleNamespace(delivery_tag="tag", delivery_info={"routing_key": "stoker.m.train"})
        self._app = SimpleNamespace(context=context)

    def made(error: Exception) -> Any:
        errors.append(error)
        monkeypatch.setattr(base, "__init__", begin)
        monkeypatch.setattr(base, "name", property(lambda self: "stoker.train"), raising=False)
        request: Any = LaneRequest()
        request.context = context
        return request

    return made


@pytest.mark.parametrize("first", ["acknowledge", "reject"])
@pytest.mark.parametrize("error", [*REFUSALS, BrokenPipeError("the loop's")], ids=lambda error: type(error).__name__)
def test_a_slot_comes_back_once_though_the_end_of_its_request_is_refused(
    request_of: Callable[[Exception], Any], error: Exception, first: str
) -> None:
    request = request_of(error)
    assert request.context.lanes.load() == {"train": (1, 1)}
    for end in (first, "reject", "acknowledge"):
        with pytest.raises(type(error)):
            getattr(request, end)()
        assert request.context.lanes.load() == {"train": (0, 1)}
    assert request.context.deliveries.tags() == set()
