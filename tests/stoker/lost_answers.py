"""A connection that is lost after the broker has done what it was asked, and before its answer came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

_LAST = b"the last answer"


@contextmanager
def one_lost_answer(of: bytes) -> Iterator[None]:
    """The blocking clients get no answer to what they send first with `of` in it: redis-py sends it again."""
    lost = 0
    send: Any = AbstractConnection.send_packed_command

    def send_and_lose(connection: Any, command: Any, *rest: Any, **more: Any) -> None:
        nonlocal lost
        send(connection, command, *rest, **more)
        sent = command if isinstance(command, bytes) else b"".join(command)
        if lost or of not in sent:
            return
        lost += 1
        # Until the broker has done all of it.
        send(connection, connection.pack_command("ECHO", _LAST))
        while connection.read_response() != _LAST:
            pass
        raise RedisConnectionError("the answer is lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AbstractConnection, "send_packed_command", send_and_lose)
        yield
    assert lost, "nothing of the kind was sent"
