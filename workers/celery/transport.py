"""kombu's Redis transport, made to survive a connection that drops while tasks run, and messages that it cannot read.

kombu 5.7.0 puts a running task's message back on the queue when its connection closes, and a late ack on the closed
channel then fails for want of a pool, which ends the worker. Here messages stay where they are (the lease keeps them,
`workers/celery/lease.py`), and a late ack goes through the last pool that the channel had.

A message that is not in the one form that Stoker's have ends a worker too, in kombu or in Celery, and comes back with
its lease to end the next. Here each is looked at when it comes out of its queue (`stoker.broker.envelope.read`), and
one that cannot be read goes no further (`workers/unreadable.py`). What fails behind that is caught where kombu hands it
over.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from typing import Any

import kombu.transport
import kombu.transport.redis as kombu_redis
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import virtual
from kombu.utils.scheduling import round_robin_cycle
from redis.exceptions import RedisError, ResponseError

from stoker.broker import keys
from stoker.broker.envelope import QUEUE, UnreadableMessage, read
from workers import clock
from workers.deliveries import Deliveries, Health
from workers.unreadable import Unreadable

log = logging.getLogger(__name__)

#: The broker's trouble, which Celery waits out; every other error of a delivery is its message's.
TROUBLE = (RedisError, OperationalError, OSError)


class WorkerConnection(Connection):
    """A connection to the broker whose channels know the deliveries of their worker."""

    def __init__(self, *args: Any, deliveries: Deliveries, **kwargs: Any) -> None:
        self.deliveries = deliveries
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def as_uri(self, include_password: bool = False, *args: Any, **kwargs: Any) -> str:
        """As kombu's, except that a login without a colon, which kombu takes for a user, is not shown either."""
        uri: str = super().as_uri(include_password, *args, **kwargs)
        if include_password or self.password or not self.userid:
            return uri
        scheme, separator, rest = uri.partition("://")
        return f"{scheme}{separator}**@{rest.rpartition('@')[2]}"

    def clone(self, **kwargs: Any) -> WorkerConnection:
        copy: WorkerConnection = super().clone(deliveries=self.deliveries, **kwargs)  # type: ignore[no-untyped-call]
        return copy


class ReadableClient(kombu_redis.PrefixedStrictRedis):
    """Answers a BRPOP as if nothing had come when what came cannot be read."""

    def __init__(self, *args: Any, dead_letter: Callable[[Unreadable], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._dead_letter = dead_letter

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not reply:
            return reply
        queue, raw = keys.queue_of(reply[0].decode()), reply[1]
        try:
            return queue.encode(), json.dumps(read(raw, queue)).encode()
        except UnreadableMessage as error:
            self._dead_letter(Unreadable(raw, queue, str(error)))
            return None


def _always() -> bool:
    return True


class QoS(kombu_redis.QoS):
    #: Whether the lane that this channel serves takes one more job; a channel that serves no lane always does.
    has_room: Callable[[], bool] = staticmethod(_always)

    def can_consume(self) -> bool:
        # What a BRPOP under way brings has left its queue already: kombu would leave it unread until there is room.
        return bool(self.channel._in_poll or self.has_room()) and super().can_consume()  # type: ignore[no-untyped-call]

    def append(self, message: Any, delivery_tag: str) -> None:
        """As kombu's, except that the message is held from now on by the broker's clock."""
        delivery = message.delivery_info
        held = json.dumps([message._raw, delivery["exchange"], delivery["routing_key"]])

        def hold() -> None:
            with self.channel.conn_or_acquire() as client:
                clock.hold(client, delivery_tag, held)

        self._mended(hold)
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        def forget() -> None:
            with self.channel.conn_or_acquire() as client:
                clock.let_go(client, delivery_tag)
            virtual.QoS.ack(self, delivery_tag)

        self._let_go(delivery_tag, forget)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._let_go(delivery_tag, lambda: kombu_redis.QoS.reject(self, delivery_tag, requeue))

    def _let_go(self, delivery_tag: str, write: Callable[[], object]) -> None:
        """End a delivery. What the broker does not take stays unacknowledged there and is held here no longer: nobody
        renews its lease, so it comes back when that has run out. An error would end the round of all deliveries, and
        with it the acks that come after this one."""
        try:
            self._mended(write)
        except TROUBLE as error:
            log.warning(
                "message %s comes back with its lease: the broker did not take its end (%s)", delivery_tag, error
            )
            virtual.QoS.ack(self, delivery_tag)

    def _mended(self, write: Callable[[], object]) -> None:
        """Write into the table of messages that are held. Another program's value in its place would end the round of
        all deliveries: it is moved aside, and the write is sent again, which changes nothing that was done."""
        try:
            write()
        except ResponseError:
            if not self.channel.deliveries.mend():
                raise
            write()

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """As kombu's, except that the broker's clock says which leases have run out."""
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1) or not self.channel.deliveries.health.may_take_over():
            return
        with (
            suppress(kombu_redis.MutexHeld),
            self.channel.conn_or_acquire() as client,
            kombu_redis.Mutex(client, self.unacked_mutex_key, self.unacked_mutex_expire),
        ):
            oldest = clock.now(client) - self.visibility_timeout
            # Without a limit (`num`: None) kombu gives no offset either.
            span = {"desc": True, "byscore": True, "offset": num and start, "num": num}
            for tag in client.zrange(self.unacked_index_key, oldest, 0, **span):
                self.restore_by_tag(tag, client)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """A dead worker's message goes back to its queue, unless what is written under its tag is none."""
        with self.channel.conn_or_acquire(client) as connected:
            raw = connected.hget(self.unacked_key, tag)
            trouble = raw and _why_not_held(raw)
            if trouble:
                self.channel.deliveries.dead_letter(Unreadable(raw, "unacked", trouble))
                self._remove_from_indices(tag).execute()  # type: ignore[no-untyped-call]
            else:
                super().restore_by_tag(tag, connected, leftmost)  # type: ignore[no-untyped-call]


def _why_not_held(raw: bytes) -> str | None:
    """What is wrong with an entry of kombu's table of messages that workers hold. Of the message only as much is asked
    as kombu needs to put it back: workers of another release hold theirs in the same table."""
    try:
        message, _, queue = json.loads(raw.decode())
    except (ValueError, TypeError, RecursionError) as error:
        return f"what is held is no message with its queue ({type(error).__name__}: {error})"
    if not isinstance(queue, str) or not QUEUE.fullmatch(queue):
        return f"what is held names {str(queue)[:80]!r}, which is no queue of jobs"
    parts = message if isinstance(message, dict) else {}
    properties = parts.get("properties")
    delivery = properties.get("delivery_info") if isinstance(properties, dict) else None
    if not isinstance(parts.get("headers"), dict) or not isinstance(delivery, dict):
        return "what is held has no headers or no delivery_info"
    return None


class _OwnFirst(round_robin_cycle):
    """What a BRPOP asks for, by turns: the lists of messages that are for `worker()` alone, and then the queues."""

    def __init__(self, worker: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._worker = worker

    def consume(self, n: int) -> list[str]:
        queues: list[str] = super().consume(n)  # type: ignore[no-untyped-call]
        worker = self._worker()
        own = [keys.placed(queue, worker).removeprefix(keys.PREFIX) for queue in queues] if worker else []
        return own + queues


class Channel(kombu_redis.Channel):
    QoS = QoS
    #: For each thread that may acknowledge at the same moment: kombu has 10, and would refuse the eleventh its ack.
    max_connections = 1024
    #: The worker that takes the messages which are for it alone, too; "": none does.
    worker = ""
    _last_pool: Any = None
    _acking: Any = None

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        owner = connection.client
        #: A connection of no worker's app holds none.
        self.deliveries = owner.deliveries if isinstance(owner, WorkerConnection) else Deliveries(Health(math.inf))
        super().__init__(connection, **kwargs)  # type: ignore[no-untyped-call]
        self._queue_cycle = _OwnFirst(lambda: self.worker)

    @property
    def do_restore(self) -> bool:  # type: ignore[override]
        """Whether what was prefetched goes back to its queue at once when this channel closes."""
        return self.deliveries.go_back

    @property
    def pool(self) -> Any:
        if self._pool is None:
            if self.closed and self._last_pool is not None:
                return self._last_pool
            self._pool = self._last_pool = self._get_pool()  # type: ignore[no-untyped-call]
        return self._pool

    def close(self) -> None:
        super().close()  # type: ignore[no-untyped-call]
        # What went back to its queue meanwhile took a connection. A thread that acknowledges just now keeps its own.
        if self._last_pool is not None:
            self._last_pool.disconnect(inuse_connections=False)

    def _do_restore_message(
        self, payload: Any, exchange: str, routing_key: str, pipe: Any, leftmost: bool = False
    ) -> None:
        """As kombu's for a job's message, without its look-up of queues: were that refused, kombu would take the
        message off what is held all the same, and put it back nowhere."""
        payload["headers"]["redelivered"] = True
        payload["properties"]["delivery_info"]["redelivered"] = True
        (pipe.lpush if leftmost else pipe.rpush)(routing_key, json.dumps(payload))

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client serves the acks of all threads: kombu makes one for each, which takes longer than the ack."""
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        client = self._acking
        if client is None or client.connection_pool is not self.pool:
            client = self._acking = super()._create_client()  # type: ignore[no-untyped-call]
        return client

    def _get_client(self) -> Any:
        return functools.partial(
            ReadableClient, global_keyprefix=self.global_keyprefix, dead_letter=self.deliveries.dead_letter
        )

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        consumed = super().basic_consume(queue, no_ack, *args, **kwargs)  # type: ignore[no-untyped-call]
        callbacks = self.connection._callbacks
        callbacks[queue] = functools.partial(self._hand_over, callbacks[queue], queue, no_ack)
        return consumed

    def _hand_over(self, deliver: Callable[[Any], Any], queue: str, no_ack: bool, raw: Any) -> Any:
        try:
            return deliver(raw)
        except TROUBLE:
            raise
        except Exception as error:
            log.exception("a message of %s could not be delivered", queue)
            if not no_ack:
                self._refuse(raw, queue, f"it could not be delivered ({type(error).__name__}: {error})")

    def _refuse(self, raw: Any, queue: str, trouble: str) -> None:
        self.deliveries.dead_letter(Unreadable(json.dumps(raw).encode(), queue, trouble))
        tag = raw["properties"]["delivery_tag"]
        if not self.deliveries.drop(tag):
            self.qos.ack(tag)

    def _receive_one(self, c: Any) -> Any:
        try:
            return super()._receive_one(c)  # type: ignore[no-untyped-call]
        except RecursionError as error:
            log.warning("a control message that cannot be read is left out: %s", error)
            raise Empty from None


class Transport(kombu_redis.Transport):
    Channel = Channel


class SentinelChannel(Channel, kombu_redis.SentinelChannel):
    """Asks the sentinels where the broker is, each time that a connection is opened."""


class SentinelTransport(kombu_redis.SentinelTransport):
    Channel = SentinelChannel


def install() -> None:
    """Make kombu use these transports for every URL that `Address` has."""
    for scheme, transport in (("redis", Transport), ("rediss", Transport), ("sentinel", SentinelTransport)):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{transport.__name__}"
        # A connection that was made before keeps its own; kombu would give its class to all that come after, too.
        kombu.transport._transport_cache.pop(scheme, None)
