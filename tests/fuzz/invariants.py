"""What must hold whenever no input is under way: nothing waits, nothing is held, nothing is left, and the worker is the
one that it was."""

from __future__ import annotations

import base64
import itertools
import re
import time
from pathlib import Path

from stoker.broker import keys
from tests.fuzz.world import World
from tests.leaks import open_work, overlong_keys
from workers.services import resting

#: Seconds until nothing waits and nothing is held: a lost message is found after some leases.
QUIET_WITHIN = 45.0
#: Megabytes by which a worker's memory may be above what it was at the first look, and the broker's. 1500 inputs in two
#: minutes leave 42 MB in a worker, most of it after the first few hundred (caches, heaps). The rest of the bound is for
#: other seeds and machines; a leak of 128 kB an input passes it in that time.
WORKER_GROWTH, BROKER_GROWTH = 192, 48
#: Threads by which a worker may have more than at the first look: Celery's pool starts one for each job that is held.
MORE_THREADS = 24
#: Kinds of keys that a worker or an operator keeps; all others belong to a job.
KEPT = ("worker", "workers", "models", "janitor", "policy", "prefixes", "binding", "unacked", "adapters", "pace")


#: What kombu and Celery say of control messages that no Celery sent, with where they were when they read them.
CONTROL = re.compile(
    r"(Control command error|Cannot process event on channel|Can't decode message body"
    r"|a message of \S+celery\.pidbox could not be delivered)"
    r".*?(?=^\[\d{4}-|\Z)",
    re.DOTALL | re.MULTILINE,
)


class Invariants:
    """Each look compares with the first one."""

    def __init__(self, world: World) -> None:
        self._world = world
        pid = world.member.pid
        assert pid is not None
        self._pid = pid
        self._log = world.member.log.stat().st_size
        #: Megabytes and threads at each look.
        self.resident: list[float] = []
        self.threads: list[int] = []
        self.stored: list[float] = []

    def broken(self) -> list[str]:
        """Those that do not hold. What jobs that have ended left in the broker is deleted."""
        if self._world.member.pid != self._pid:
            return [f"the worker has ended: {self._log_since()[-3000:]}"]
        return [*self._not_quiet(), *self._log_is_wrong(), *self._left(), *self._grown()]

    def _not_quiet(self) -> list[str]:
        end, began = time.monotonic() + QUIET_WITHIN, time.time()
        while True:
            found = self._busy(began)
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def _busy(self, since: float) -> list[str]:
        now, redis = self._world.presence(self._pid), self._world.client.redis
        if now is None or now.time < since:
            return ["the worker says nothing of itself"]
        held = [f"the lane {kind} holds {count}" for kind, (count, _) in now.lanes.items() if count]
        return held + [f"work is left at {key}" for key in open_work(redis) if not self._only_ids(key)]

    def _only_ids(self, key: str) -> bool:
        """Whether all that is left is ids of a client's jobs whose records went: they go when it sends more."""
        kind, redis = keys.kind_of(key), self._world.client.redis
        if kind is None or kind.name != "client" or redis.type(key) != b"zset":
            return False
        queue = key.removeprefix(keys.client("default", ""))
        return not set(redis.zrange(key, 0, -1)) & set(redis.zrange(keys.open_jobs(queue), 0, -1))

    def _log_is_wrong(self) -> list[str]:
        """No error of an input is one that the worker did not expect."""
        said = self._log_since()
        self._log = self._world.member.log.stat().st_size
        parts = CONTROL.sub("", said).split("Traceback (most recent call last)")
        return [
            f"a traceback in the log: {before[-300:]}…{after[:1500]}" for before, after in itertools.pairwise(parts)
        ][:3]

    def _log_since(self) -> str:
        return self._world.member.log.read_bytes()[self._log :].decode(errors="replace")

    def _left(self) -> list[str]:
        redis, wrong = self._world.client.redis, []
        for name, letter in self._world.client.dead().items():
            if base64.b64decode(letter.get("message", "")) not in self._world.messages:
                wrong.append(f"a dead letter that no input explains: {name} {str(letter)[:500]}")
        redis.delete(keys.DEAD)
        self._world.messages.clear()
        wrong += overlong_keys(redis)
        for key in [key.decode() for key in redis.scan_iter(count=1000)]:
            kind = keys.kind_of(key)
            if kind is None or kind.name in KEPT or f":{'sound'}" in key:
                continue
            if kind.name == "input":
                wrong.append(f"an input is left: {key}")
            redis.delete(key)
        return wrong

    def _grown(self) -> list[str]:
        process = Path(f"/proc/{self._pid}")
        resident = self._rested(process)
        self.resident.append(resident)
        self.threads.append(len(list(process.joinpath("task").iterdir())))
        self.stored.append(self._world.client.redis.info("memory")["used_memory"] / 2**20)
        wrong = []
        if resident > self.resident[0] + WORKER_GROWTH:
            wrong.append(f"the worker's memory grew from {self.resident[0]:.0f} MB to {resident:.0f} MB")
        if not self.threads[0] <= self.threads[-1] <= self.threads[0] + MORE_THREADS:
            wrong.append(f"the worker had {self.threads[0]} threads and has {self.threads[-1]}")
        if self.stored[-1] > self.stored[0] + BROKER_GROWTH:
            wrong.append(f"the broker's memory grew from {self.stored[0]:.0f} MB to {self.stored[-1]:.0f} MB")
        return wrong

    def _rested(self, process: Path) -> float:
        """Megabytes of the worker; of one that has grown, once it has had the time to give back what lies free."""
        end = time.monotonic() + 2 * resting.EVERY
        while True:
            resident = int(process.joinpath("statm").read_text().split()[1]) * 4096 / 2**20
            if not self.resident or resident <= self.resident[0] + WORKER_GROWTH or time.monotonic() > end:
                return resident
            time.sleep(0.1)
