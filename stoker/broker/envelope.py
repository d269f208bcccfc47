"""The message that makes a worker look at a job: Celery's, version 2 of its protocol, in kombu's form for Redis.

It carries no payload. What is asked lies in the job's record, which a worker gets when it claims the job: so a message
is small however large the request, and the broker's scripts can put it where its turn is (`stoker.broker.ledger`).
That is also why it is written here and not by Celery, whose producer can only append it to a list; a test compares the
two.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
from typing import Any

from stoker.contract.kinds import task_name
from stoker.contract.names import Rule, follows

#: No arguments, no keyword arguments, no callbacks.
_BODY = base64.b64encode(
    json.dumps([[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()
).decode()
_ORIGIN = f"stoker{os.getpid()}@{socket.gethostname()}"

#: Bytes that a message may have. Ours have about a thousand.
LONGEST = 16 * 1024
#: A queue (`stoker.broker.keys.queue`) and the kind of its jobs.
QUEUE = re.compile(rf"stoker\.{Rule.NAME.pattern}\.(?P<kind>[a-z]+)(\.v[0-9]+)?")
#: How often the job was sent: the rest of a delivery tag, behind the job's id.
_NUMBER = re.compile("[0-9]{1,18}")
#: What may differ from one message of a job to the next: for people, or for a tool that watches.
_FREE = ("argsrepr", "origin", "delivery_tag")


class UnreadableMessage(ValueError):
    """A message that no client of Stoker wrote. It says which part is wrong, what is allowed, and what was given."""


def envelope(job_id: str, kind: str, model: str, queue: str) -> str:
    """The message as it stands in the queue's list. The ledger gives it a delivery tag each time it is sent."""
    # The ledger looks for `"delivery_tag": "` with this very spacing.
    return json.dumps(_message(job_id, kind, model, queue), separators=(", ", ": "))


def _message(job_id: str, kind: str, model: str, queue: str) -> dict[str, Any]:
    properties = {
        "correlation_id": job_id,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": "",
    }
    return {
        "body": _BODY,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": _headers(job_id, kind, model),
        "properties": properties,
    }


def _headers(job_id: str, kind: str, model: str) -> dict[str, Any]:
    return {
        "lang": "py",
        "task": task_name(kind),
        "id": job_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": job_id,
        "parent_id": None,
        "argsrepr": f"({model})",
        "kwargsrepr": "{}",
        "origin": _ORIGIN,
        "ignore_result": None,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }


def read(raw: bytes, queue: str) -> dict[str, Any]:
    """The message that came out of `queue`, as `envelope` makes it: a worker gives Celery nothing else.

    Celery and kombu believe what a message says of its encoding, its time and its callbacks, and end the worker over
    much of what they cannot believe. Nothing of that is ever another than in `envelope`, so a message that differs is
    refused here, with `UnreadableMessage`. What another release adds to its messages is left out.
    """
    message = _parsed(raw)
    job_id, kind = _text(message, "headers", "id"), QUEUE.fullmatch(queue)
    if kind is None:
        raise UnreadableMessage(f"it came out of {queue!r}, which is no queue of jobs")
    if not follows(Rule.JOB_ID, job_id):
        raise UnreadableMessage(f"headers.id is {_brief(job_id)}; allowed: {Rule.JOB_ID.allowed}")
    tag = _text(message, "properties", "delivery_tag")
    if not (tag.startswith(f"{job_id}#") and _NUMBER.fullmatch(tag, len(job_id) + 1)):
        raise UnreadableMessage(f"properties.delivery_tag is {_brief(tag)}; allowed: {job_id}#NUMBER")
    right = _message(job_id, kind["kind"], "", queue)
    _compare(message, right, "")
    right["properties"]["delivery_tag"] = tag
    right["headers"]["argsrepr"] = _text(message, "headers", "argsrepr")
    return right


def _parsed(raw: bytes) -> Any:
    if len(raw) > LONGEST:
        raise UnreadableMessage(f"it has {len(raw)} bytes; allowed: {LONGEST}")
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise UnreadableMessage(f"it is no JSON ({type(error).__name__}: {error})") from None


def _text(message: Any, part: str, name: str) -> str:
    value = message.get(part) if isinstance(message, dict) else None
    value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise UnreadableMessage(f"{part}.{name} is {_brief(value)}; allowed: a text")
    return value


def _compare(given: Any, right: Any, where: str) -> None:
    """Raise `UnreadableMessage` for the first part that differs."""
    if isinstance(right, dict) and isinstance(given, dict):
        for name, value in right.items():
            if name not in _FREE:
                _compare(given.get(name), value, f"{where}.{name}")
    elif type(given) is not type(right) or given != right:
        raise UnreadableMessage(f"{where[1:]} is {_brief(given)}; allowed: {_brief(right)}")


def _brief(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "what is nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}…"
