"""Celery's consumer of jobs, with a channel for each lane.

kombu asks for the next message of all queues of a channel with one BRPOP, which waits in the broker for up to a second
and cannot be changed meanwhile. Were all lanes on one channel, a lane that was full would be left out of the BRPOP in
which the others wait, and when it has room again its next job would lie there for the rest of that second. With a
channel each, a lane's BRPOP is its own: a full lane sends none, and one that has room again sends it at once. It fills
when its BRPOP has just been answered, so none is under way that could bring a job too many.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.app.amqp import AMQP
from kombu.entity import Queue
from kombu.messaging import Consumer

from stoker.contract.kinds import GENERATE
from workers.capacity import Lanes
from workers.celery.transport import WorkerConnection
from workers.context import WorkerContext


class LaneConsumer(Consumer):
    """Made anew for each connection, which closes its channels with itself."""

    def __init__(self, *args: Any, lanes: Lanes, worker: str, **kwargs: Any) -> None:
        self.lanes, self.worker = lanes, worker
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def revive(self, channel: Any) -> None:
        #: Kind → the channel of its lane; a queue that belongs to no lane has the connection's own.
        self.channels: dict[str | None, Any] = {}
        super().revive(channel)  # type: ignore[no-untyped-call]
        self.channels[None] = self.channel

    def channel_of(self, queue: str) -> Any:
        """The channel on which the messages of `queue` come."""
        kind = self.lanes.kind_of(queue)
        if kind is not None and kind not in self.channels:
            channel = self.connection.channel()
            channel.qos.has_room = partial(self.lanes.has_room, kind)
            channel.worker = self.worker if kind == GENERATE.name else ""
            self.channels[kind] = channel
        return self.channels[kind]

    def _basic_consume(
        self, queue: Queue, consumer_tag: str | None = None, no_ack: bool | None = None, nowait: bool = True
    ) -> Any:
        there = queue(self.channel_of(queue.name))
        return super()._basic_consume(there, consumer_tag, no_ack, nowait)  # type: ignore[no-untyped-call]

    def cancel(self) -> None:
        for tag in self._active_tags.values():
            self._cancel(tag)
        super().cancel()  # type: ignore[no-untyped-call]

    close = cancel

    def cancel_by_queue(self, queue: Queue | str) -> None:
        tag = self._active_tags.get(queue.name if isinstance(queue, Queue) else queue)
        if tag is not None:
            self._cancel(tag)
        super().cancel_by_queue(queue)  # type: ignore[no-untyped-call]

    def _cancel(self, tag: str) -> None:
        # A channel takes no notice of tags that are not its own.
        for channel in self.channels.values():
            channel.basic_cancel(tag)

    def held_tags(self) -> set[str]:
        """Delivery tags that this connection brought and that are neither acknowledged nor given back."""
        books = [channel.qos for channel in list(self.channels.values())]
        return {tag for book in books for tag in list(book._delivered) if tag not in book._dirty}


class LaneAMQP(AMQP):
    """How Celery gets the consumer, and connections that know whose they are: `Celery(amqp=...)`."""

    def Consumer(self, *args: Any, **kwargs: Any) -> LaneConsumer:
        return LaneConsumer(*args, lanes=self._context.lanes, worker=self._context.worker, **kwargs)

    def Connection(self, *args: Any, **kwargs: Any) -> WorkerConnection:
        return WorkerConnection(*args, deliveries=self._context.deliveries, **kwargs)

    @property
    def _context(self) -> WorkerContext:
        context: WorkerContext = self.app.context
        return context
