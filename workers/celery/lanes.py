"""Celery's steps and requests of the lanes (`workers/capacity.py`): a slot is held for as long as its message is."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from celery import bootsteps
from celery.worker.request import Request
from kombu.transport.virtual.base import QoS

from stoker.contract.kinds import of_task
from workers.context import WorkerContext


def _nothing() -> None: ...


class LaneStep(bootsteps.StartStopStep):
    """Lets the lanes wake the consumer's loop when they have room again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        context: WorkerContext = consumer.app.context
        context.lanes.wake = partial(consumer.call_soon, _nothing)
        context.consumer_started(consumer)


class LaneRequest(Request):
    """A request that holds a slot in its kind's lane from the moment it is taken until it is acked or rejected, whether
    the broker takes that or not: a message whose end it does not take comes back with its lease."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._context: WorkerContext = self._app.context
        self._kind = of_task(self.name).name
        #: Names this delivery, and no other of the same job: what the job's record calls its owner by.
        self.token = uuid.uuid4().hex
        self._request_dict |= {"stoker_token": self.token, "stoker_tag": self.tag}
        self._context.deliveries.add(self)
        self._context.lanes.enter(self._kind)

    @property
    def tag(self) -> str:
        return str(self.message.delivery_tag)

    @property
    def queue(self) -> str:
        return str(self.message.delivery_info["routing_key"])

    def fence(self) -> None:
        """The message belongs to another worker now, under the same delivery tag: an ack from here would take it away
        from there. From now on this request only forgets it."""
        self._on_ack = self._on_reject = self._forget

    def _forget(self, *_: Any) -> None:
        # A frozen worker may get its own message again, and then holds the tag twice: the newer delivery needs it.
        if not self._context.deliveries.another_holds(self.tag, than=self):
            QoS.ack(self.message.channel.qos, self.tag)

    def acknowledge(self) -> None:
        try:
            super().acknowledge()
        finally:
            self._leave()

    def reject(self, requeue: bool = False) -> None:
        try:
            super().reject(requeue=requeue)
        finally:
            self._leave()

    def revoked(self) -> bool:
        """Never by Celery's own list, which any control message fills: the ledger knows which jobs were cancelled."""
        return False

    def _leave(self) -> None:
        # The consumer's thread and the pool's may end a delivery at the same moment.
        if self._context.deliveries.remove(self):
            self._context.lanes.leave(self._kind)
