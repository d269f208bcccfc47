"""Looking for jobs whose message is nowhere, and letting them wait again.

kombu takes a message off its list and then writes it down as unacknowledged: a worker that dies in between takes the
message with it. The records know (`stoker.ledger.recover`).
"""

from __future__ import annotations

import json
import logging

from stoker import keys, ledger
from stoker.contract import CONTRACT
from workers.broker_check import warn_of
from workers.runtime import Runtime

log = logging.getLogger(__name__)


class Janitor:
    """One worker at a time does the round; who it is changes by itself."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def round(self) -> None:
        """Look at every queue of every known model, if nobody else has just done it."""
        redis, every = self._runtime.redis, 2 * self._runtime.settings.lease
        if not redis.set(keys.JANITOR, self._runtime.name, nx=True, ex=every):
            return
        warn_of(redis.info("memory"))
        for raw in redis.hgetall(keys.MODELS).values():
            card = json.loads(raw)
            for kind in card["kinds"] if card["contract"] == CONTRACT else ():
                for job_id in ledger.recover(redis, keys.queue(card["model"], kind), older_than=every):
                    log.warning("job %s: its message was lost; it waits again", job_id.decode())
