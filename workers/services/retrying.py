"""How long a worker sends again what the broker did not take."""

from __future__ import annotations

import time
from collections.abc import Callable

from redis.exceptions import RedisError

from stoker.broker.connection import TROUBLE, passes
from stoker.broker.trouble import forbids

#: Seconds for which a broker is asked again that answers and refuses: a replica in a fail-over, a full memory or disk.
REFUSAL_LIMIT = 300.0
#: Seconds for a command that the broker's user may not use: an operator may be changing its rights, and another worker
#: may have a better user. Without a pause a job would go round between its queue and this worker without end.
FORBIDDEN_LIMIT = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0


class Retry:
    """One thing that must reach the broker. A broker that is away is waited for until the worker stops, because nothing
    can be reported meanwhile. One that refuses is asked again for `limit` seconds, and one that forbids for
    `FORBIDDEN_LIMIT`. After any other error it is not asked again."""

    def __init__(self, limit: float = REFUSAL_LIMIT, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._refused: float | None = None
        self._pause = FIRST_PAUSE

    def pause(self, error: RedisError) -> float | None:
        """Seconds to wait before the next try; None if there is no point in one."""
        forbidden = forbids(error)
        if not forbidden and not passes(error):
            return None
        if isinstance(error, TROUBLE):
            self._refused = None
        else:
            self._refused = self._clock() if self._refused is None else self._refused
            if self._clock() - self._refused >= (min(FORBIDDEN_LIMIT, self._limit) if forbidden else self._limit):
                return None
        pause, self._pause = self._pause, min(LONGEST_PAUSE, 2 * self._pause)
        return pause
