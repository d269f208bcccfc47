"""Reading a message: what a client wrote is read as it is, and anything else is refused with what is wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.broker import keys
from stoker.broker.envelope import LONGEST, UnreadableMessage, envelope, read

QUEUE = keys.queue("m", "generate")
Change = Callable[[dict[str, Any]], None]


def message(job_id: str = "job", kind: str = "generate") -> dict[str, Any]:
    """As the ledger sends it."""
    made: dict[str, Any] = json.loads(envelope(job_id, kind, "m", keys.queue("m", kind)))
    made["properties"]["delivery_tag"] = f"{job_id}#1"
    return made


def sent(made: dict[str, Any]) -> bytes:
    return json.dumps(made).encode()


@pytest.mark.parametrize("kind", ["generate", "embed", "train", "adapters"])
def test_a_message_of_each_kind_is_read_as_it_was_sent(kind: str) -> None:
    assert read(sent(message(kind=kind)), keys.queue("m", kind)) == message(kind=kind)


def test_the_queues_of_models_with_dots_and_of_later_generations_are_known() -> None:
    for queue in ("stoker.a.b-c.generate", "stoker.train.generate.v2"):
        made = json.loads(envelope("job", "generate", "m", queue))
        made["properties"]["delivery_tag"] = "job#12"
        assert read(sent(made), queue)["headers"]["id"] == "job"


def test_a_message_that_came_back_from_a_dead_worker_is_read() -> None:
    made = message()
    made["headers"]["redelivered"] = made["properties"]["delivery_info"]["redelivered"] = True
    assert read(sent(made), QUEUE) == message()


def test_what_another_release_adds_is_left_out() -> None:
    made = message()
    made["headers"]["new"] = made["properties"]["new"] = made["new"] = {"x": 1}
    assert read(sent(made), QUEUE) == message()


def test_another_host_may_have_sent_it() -> None:
    made = message()
    made["headers"]["origin"] = "stoker1@elsewhere"
    assert read(sent(made), QUEUE) == message()


def body(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def put(*path: str, to: Any) -> Change:
    def change(made: dict[str, Any]) -> None:
        for name in path[:-1]:
            made = made[name]
        made[path[-1]] = to

    return change


CHAIN = {"callbacks": [{"task": "stoker.embed"}], "errbacks": None, "chain": None, "chord": None}
WRONG: dict[str, Change] = {
    "headers": put("headers", to=None),
    "headers.task": put("headers", "task", to="os.system"),
    "headers.task, of another lane": put("headers", "task", to="stoker.train"),
    "headers.task, of Celery": put("headers", "task", to="celery.map"),
    "headers.task, a list": put("headers", "task", to=["a"]),
    "headers.id": put("headers", "id", to=None),
    "headers.id, a path": put("headers", "id", to="../../x"),
    "headers.eta": put("headers", "eta", to="2099-01-01T00:00:00+00:00"),
    "headers.expires": put("headers", "expires", to="2001-01-01T00:00:00"),
    "headers.retries": put("headers", "retries", to="x"),
    "headers.retries, true": put("headers", "retries", to=False),
    "headers.timelimit": put("headers", "timelimit", to=["x", "y"]),
    "headers.shadow": put("headers", "shadow", to="stoker.embed"),
    "headers.group": put("headers", "group", to="g"),
    "headers.stamps": put("headers", "stamps", to="x"),
    "headers.argsrepr": put("headers", "argsrepr", to=["x"]),
    "properties": put("properties", to=[]),
    "properties.delivery_tag": put("properties", "delivery_tag", to=[1]),
    "properties.delivery_tag, another job's": put("properties", "delivery_tag", to="victim#1"),
    "properties.delivery_tag, another's with an id as long": put("properties", "delivery_tag", to="jab#1"),
    "properties.delivery_tag, no number": put("properties", "delivery_tag", to="job#1x"),
    "properties.delivery_tag, too long a number": put("properties", "delivery_tag", to="job#" + 19 * "1"),
    "properties.delivery_info": put("properties", "delivery_info", to={}),
    "properties.delivery_info.routing_key": put("properties", "delivery_info", "routing_key", to="zzz"),
    "properties.body_encoding": put("properties", "body_encoding", to="rot13"),
    "properties.priority": put("properties", "priority", to="high"),
    "properties.reply_to": put("properties", "reply_to", to={"x": 1}),
    "content-type": put("content-type", to="application/x-python-serialize"),
    "content-encoding": put("content-encoding", to="no-such-codec"),
    "body": put("body", to=body([])),
    "body, with callbacks": put("body", to=body([[], {}, CHAIN])),
    "body, with arguments": put("body", to=body([[1], {}, {}])),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_message_that_differs_is_refused_with_the_part_that_does(what: str) -> None:
    made = message()
    WRONG[what](made)
    with pytest.raises(UnreadableMessage) as refused:
        read(sent(made), QUEUE)
    assert str(refused.value).startswith(what.split(",")[0])
    assert "; allowed: " in str(refused.value)


NO_MESSAGE = [b"", b"garbage", b"[]", b"1", b"{}", b"null", b'"x"', b"\xff\xfe\x00", b"[" * 10_000, b"1" * 10_000]


@pytest.mark.parametrize("raw", NO_MESSAGE, ids=lambda raw: repr(raw[:8]))
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(UnreadableMessage):
        read(raw, QUEUE)


def test_a_message_that_is_too_long_is_refused_with_both_lengths() -> None:
    made = message()
    made["headers"]["argsrepr"] = "x" * LONGEST
    with pytest.raises(UnreadableMessage, match=f"it has {len(sent(made))} bytes; allowed: {LONGEST}"):
        read(sent(made), QUEUE)


@pytest.mark.parametrize("queue", ["celery", "stoker:x", "stoker.m", "stoker.M.generate", ""])
def test_a_message_from_elsewhere_is_refused(queue: str) -> None:
    with pytest.raises(UnreadableMessage):
        read(sent(message()), queue)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PARTS = [(part,) for part in message()] + [
    (part, name) for part in ("headers", "properties") for name in message()[part]
]


@given(st.sampled_from(PARTS), JSON)
def test_any_value_in_any_part_is_read_as_ours_or_refused(path: tuple[str, ...], value: Any) -> None:
    made = message()
    put(*path, to=value)(made)
    try:
        found = read(sent(made), QUEUE)
    except UnreadableMessage:
        return
    right = message()
    right["headers"]["argsrepr"] = found["headers"]["argsrepr"]
    assert found == right, "nothing of it reaches Celery"


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(UnreadableMessage):
        read(raw, QUEUE)
