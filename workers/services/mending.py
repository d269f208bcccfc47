"""Keys that hold a wrong type: another program wrote there, and the broker refuses every script that needs one.

What was in such a key is lost already. What stands there now is moved aside, so that work goes on: the registries are
written again at the next beat, orders begin anew, and jobs whose message is gone are sent again (`janitor.py`). What
other keys still say is put in its place in the same step (`rebuilding.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from stoker.broker import keys, ledger
from workers.services.rebuilding import gathered

log = logging.getLogger(__name__)

#: Keys that all queues share.
_OF_VECTORS = (keys.VECTORS_UNFETCHED, keys.VECTORS_FETCHED, keys.VECTORS_SIZES)
SHARED = keys.types([keys.MODELS, keys.WORKERS, keys.POLICY, keys.DEAD, keys.UNACKED, keys.LEASES, *_OF_VECTORS])

#: KEYS: one that may be wrong, and where to move it. ARGV: its right type, seconds to keep what stood there, seconds
#: that the key lives (0: it is durable), then its members and their scores. Another worker may have been here in
#: between, and the key may be right again.
_MOVE = """
local found = redis.call('TYPE', KEYS[1]).ok
if found == ARGV[1] or found == 'none' then return 0 end
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
for i = 4, #ARGV, 2 do
  if ARGV[1] == 'set' then redis.call('SADD', KEYS[1], ARGV[i]) end
  if ARGV[1] == 'zset' then redis.call('ZADD', KEYS[1], ARGV[i + 1], ARGV[i]) end
end
if ARGV[3] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
return 1
"""


def keys_of(queue: str) -> dict[str, str]:
    """The keys that the jobs of one queue and its model share → the type of each."""
    of_queue = (keys.ready, keys.open_jobs, keys.dispatched, keys.turns, keys.pace, keys.sizes)
    backlogs = [keys.backlog(queue, priority) for priority in range(ledger.PRIORITIES)]
    of_model = (name(keys.model_of(queue)) for name in (keys.adapters, keys.prefixes))
    return keys.types([*(name(queue) for name in of_queue), *backlogs, *of_model])


class Mender:
    """`queues` are those that this worker serves, each time it is asked; `worker` is its name in the ledger."""

    def __init__(self, redis: Any, queues: Callable[[], list[str]], worker: str) -> None:
        self._redis, self._queues, self._worker = redis, queues, worker

    def round(self) -> bool:
        """Move aside every key of a wrong type; return whether there was one."""
        right = dict(SHARED)
        for queue in self._queues():
            right |= keys_of(queue) | keys.types([keys.placed(queue, self._worker)])
        pipeline = self._redis.pipeline(transaction=False)
        for key in right:
            pipeline.type(key)
        found = dict(zip(right, pipeline.execute(), strict=True))
        wrong = [key for key, kind in right.items() if found[key].decode() not in (kind, "none")]
        moved = [self.move(key, found[key].decode(), right[key]) for key in wrong]
        return any(moved)

    def move(self, key: str, found: str, kind: str) -> bool:
        aside, members = keys.spoiled(key), gathered(self._redis, key)
        arguments = [part for member in members.items() for part in member]
        moved = bool(self._redis.eval(_MOVE, 2, key, aside, kind, keys.DEAD_TTL, keys.lifetime(key) or 0, *arguments))
        if moved:
            log.error("the key %s was a %s, not a %s: what was written there is now %s; %d members are known from "
                "other keys and stand there again", key, found, kind, aside, len(members))  # fmt: skip
        return moved
