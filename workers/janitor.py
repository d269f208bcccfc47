"""Looking for jobs whose message is nowhere, and sending it again.

kombu takes a message off its list and then writes it down as unacknowledged: a worker that dies in between takes the
message with it. A client can die between a job's record and its message. The records know (`stoker.ledger.orphans`).
"""

from __future__ import annotations

import json
import logging
from typing import Any

from celery import Celery

from stoker import keys, ledger
from workers.runtime import Runtime

log = logging.getLogger(__name__)


class Janitor:
    """One worker at a time does the round; who it is changes by itself."""

    def __init__(self, runtime: Runtime, app: Celery) -> None:
        self._runtime, self._app = runtime, app

    def round(self) -> None:
        """Look at every queue of every known model, if nobody else has just done it."""
        redis, every = self._runtime.redis, 2 * self._runtime.settings.lease
        if not redis.set(keys.JANITOR, self._runtime.name, nx=True, ex=every):
            return
        for raw in redis.hgetall(keys.MODELS).values():
            card = json.loads(raw)
            for kind in card["kinds"]:
                queue = keys.queue(card["model"], kind)
                for job_id in ledger.orphans(redis, queue, older_than=every):
                    self._send(redis, job_id, kind, queue)

    def _send(self, redis: Any, job_id: str, kind: str, queue: str) -> None:
        request = redis.hget(keys.job(job_id), "request")
        if request is not None:
            payload = json.loads(request)
            log.warning("job %s: its message was lost; sending it again", job_id)
            options = {"task_id": job_id, "queue": queue, "priority": payload.get("priority", 5)}
            self._app.send_task(f"stoker.{kind}", args=[payload], **options)
