"""The message that makes a worker look at a job: Celery's, version 2 of its protocol, in kombu's form for Redis.

It carries no payload. What is asked lies in the job's record, which a worker gets when it claims the job: so a message
is small however large the request, and the broker's scripts can put it where its turn is (`stoker.ledger`). That is
also why it is written here and not by Celery, whose producer can only append it to a list; a test compares the two.
"""

from __future__ import annotations

import base64
import json
import os
import socket
from typing import Any

#: No arguments, no keyword arguments, no callbacks.
_BODY = base64.b64encode(
    json.dumps([[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()
).decode()
_ORIGIN = f"stoker{os.getpid()}@{socket.gethostname()}"


def envelope(job_id: str, kind: str, model: str, queue: str) -> str:
    """The message as it stands in the queue's list. The ledger gives it a delivery tag each time it is sent."""
    headers: dict[str, Any] = {
        "lang": "py",
        "task": f"stoker.{kind}",
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
    properties = {
        "correlation_id": job_id,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": "",
    }
    message = {
        "body": _BODY,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    # The ledger looks for `"delivery_tag": "` with this very spacing.
    return json.dumps(message, separators=(", ", ": "))
