"""The queues that Celery's consumer takes jobs from, changed while it runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from workers.capacity import Lanes
from workers.celery.transport import TROUBLE

log = logging.getLogger(__name__)

#: Seconds that the consumer's loop has for it; while the broker is away there is no loop.
WITHIN = 10.0


class ConsumedQueues:
    """What is selected is consumed from the next connection on in any case; `serve` makes the one that there is now
    follow, in the consumer's own loop, and waits for it."""

    def __init__(self, lanes: Lanes, within: float = WITHIN) -> None:
        self._lanes, self._within = lanes, within
        self._consumer: Any = None

    def attach(self, consumer: Any) -> None:
        """Called at each start of Celery's consumer: also after a lost connection."""
        self._consumer = consumer

    def serve(self, queues: Mapping[str, Sequence[str]]) -> None:
        """Take jobs from these, by kind, and from no others."""
        self._lanes.serve(queues)
        consumer = self._consumer
        if consumer is None:
            return
        done = threading.Event()
        selected = consumer.app.amqp.queues
        wanted = {name for names in queues.values() for name in names}
        selected.deselect([name for name in selected.consume_from if name not in wanted])
        for name in wanted:
            selected.select_add(selected[name])
        consumer.call_soon(self._follow, consumer, done)
        if not done.wait(self._within):
            log.warning("the queues are changed with the next connection to the broker: there is none now")

    @staticmethod
    def _follow(consumer: Any, done: threading.Event) -> None:
        """In the consumer's loop: what it consumes becomes what is selected."""
        tasks, selected = consumer.task_consumer, consumer.app.amqp.queues.consume_from
        try:
            if tasks is None:
                return
            for queue in list(tasks.queues):
                if queue.name not in selected:
                    tasks.cancel_by_queue(queue)
            new = [queue for name, queue in list(selected.items()) if not tasks.consuming_from(name)]
            for queue in new:
                tasks.add_queue(queue)
            if new:
                tasks.consume()
        except TROUBLE as error:
            log.warning("the queues are changed with the next connection to the broker: %s", error)
        finally:
            done.set()
