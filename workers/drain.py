"""Stopping: running jobs get the grace time, then go back to the queue; nothing is lost.

Training goes back at once: it may last for hours, and nobody watches it token by token.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from redis.exceptions import RedisError

from stoker.connection import connect
from stoker.settings import Settings
from workers.runtime import Runtime
from workers.transport import restore_on_close

log = logging.getLogger(__name__)

#: What a worker ends with that could not give its jobs back.
EX_TEMPFAIL = 75
#: Seconds between looks at a broker that may be away, and looks in a row that it may miss.
LOOK_EVERY, MISSES = 1.0, 2


def begin(runtime: Runtime) -> None:
    """Called when the worker was told to stop (SIGTERM, SIGINT)."""
    restore_on_close()
    runtime.hand_back({"train"})
    timer = threading.Timer(runtime.settings.grace, _end_of_grace, [runtime])
    timer.daemon = True
    timer.start()
    log.info("draining: running jobs have %.0f s", runtime.settings.grace)


def _end_of_grace(runtime: Runtime) -> None:
    runtime.hand_back({"train", "generate", "embed", "adapters"})
    _end_if_broker_is_away(runtime.settings)


def _end_if_broker_is_away(settings: Settings) -> None:
    """A worker without a broker has nobody to hand its jobs to, and Celery would wait for one: end the process.

    Nothing is lost: no message was acknowledged, so the leases of its jobs run out and another worker takes them.
    """
    redis, missed = connect(settings, timeout=LOOK_EVERY), 0
    while missed < MISSES:
        missed = 0 if _answers(redis) else missed + 1
        threading.Event().wait(LOOK_EVERY)
    log.critical("the broker is away and the grace is over: ending without it. Leases will bring the jobs elsewhere.")
    logging.shutdown()
    os._exit(EX_TEMPFAIL)


def _answers(redis: Any) -> bool:
    try:
        return bool(redis.ping())
    except RedisError:
        return False
