"""kombu's Redis transport, made to survive a connection that drops while tasks run.

kombu 5.7.0 puts a running task's message back on the queue when its connection closes, and a late ack on the closed
channel then fails for want of a pool, which ends the worker. Here messages stay where they are (the lease keeps them,
`workers/lease.py`), and a late ack goes through the last pool that the channel had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kombu.transport
import kombu.transport.redis as kombu_redis


def _never() -> bool:
    return False


#: Whether this process may give other workers' expired messages back to the queue; `workers/lease.py` says when.
may_take_over: Callable[[], bool] = _never


class QoS(kombu_redis.QoS):
    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:
        if may_take_over():
            super().restore_visible(start, num, interval)  # type: ignore[no-untyped-call]


class Channel(kombu_redis.Channel):
    QoS = QoS
    #: Off while the worker runs; `restore_on_close` turns it on for shutdown, so that what was prefetched goes back
    #: to the queue at once.
    do_restore = False
    _last_pool: Any = None

    @property
    def pool(self) -> Any:
        if self._pool is None:
            if self.closed and self._last_pool is not None:
                return self._last_pool
            self._pool = self._last_pool = self._get_pool()  # type: ignore[no-untyped-call]
        return self._pool


class Transport(kombu_redis.Transport):
    Channel = Channel


def install() -> None:
    """Make kombu use this transport for every `redis://`, `rediss://` and `redis+socket://` URL."""
    for scheme in ("redis", "rediss"):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"


def restore_on_close() -> None:
    """From now on a closing channel requeues what was not acknowledged."""
    Channel.do_restore = True
