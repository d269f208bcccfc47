"""One round: a broker, a fleet and its load, mischief for a while, then the reckoning."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from redis.exceptions import RedisError

from stoker import Client
from stoker.broker import keys, ledger, policy
from stoker.broker.connection import connect
from stoker.errors import StokerError
from stoker.settings import Settings
from tests.chaos.disk import Disk
from tests.chaos.fleet import EMBED, GENERATE, Fleet, Member, fleet_settings
from tests.chaos.load import Answers, Load
from tests.chaos.poison import Poison
from tests.conftest import alive, wait_until
from tests.integration.machinery import FragileBroker
from tests.leaks import overlong_keys
from workers.group.channel import SILENCE

#: Workers that are kept alive, and that there are at most.
KEEP, MOST = 2, 4
QUEUES = (keys.queue(GENERATE, "generate"), keys.queue(GENERATE, "train"), keys.queue(EMBED, "embed"))


class Endings:
    """Counts how often each job's end was announced: more than once is a job that ended twice."""

    def __init__(self, settings: Settings) -> None:
        self._redis, self._over = connect(settings), threading.Event()
        self.heard: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    pubsub.psubscribe(keys.result("*"))
                    while not self._over.is_set():
                        message = pubsub.get_message(timeout=0.2)
                        if message is not None:
                            self.heard[message["channel"].decode()] += 1
            except RedisError:
                time.sleep(0.1)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)
        self._redis.close()


class Storm:
    """`run` storms for `seconds` and returns what went wrong; `counts` says what was done.

    `width`: jobs that are open. `ranks`: of a group among the workers; 1: there is none."""

    def __init__(self, home: Path, models: tuple[str, ...], seed: int, width: int, ranks: int = 1) -> None:
        self.broker = FragileBroker(home / "broker")
        settings = fleet_settings(home / "fleet", self.broker.url, models)
        self._client = Client(settings=settings.model_copy(update={"patience": 300.0}))
        # `always`: what was accepted survives `kill -9` of the broker too, also while the disk is slow.
        self._client.redis.config_set("appendfsync", "always")
        self._decide()
        self._chance, self._settings, self._width = random.Random(seed), settings, width
        # Its own: how fast jobs end does not change which mischief comes.
        self._load_chance = random.Random(f"load {seed}")
        self._ranks = ranks
        self.fleet = Fleet(settings, KEEP if ranks == 1 else KEEP - 1, ranks)
        self._poison = Poison(self._client, QUEUES, self._chance)
        self._disk = Disk((settings.runs, settings.adapters))
        self.counts: Counter[str] = Counter()
        self.adapters = settings.adapters

    def _decide(self) -> None:
        """As an operator does, again where it was lost. In a storm an innocent job may lose more than three owners."""
        with suppress(RedisError, StokerError):
            policy.decide(self._client.redis, "crashes", 1000)

    def learn(self, answers: Answers) -> None:
        """The right answers, from one worker that nobody disturbs."""
        self.fleet.start()
        self.await_warm()
        answers.learn(self._client)

    def await_warm(self) -> None:
        wait_until(lambda: self._client.workers(), "a worker is warm", 120)

    def run(self, seconds: float, answers: Answers) -> list[str]:
        self.fleet.tend()
        self.await_warm()
        endings = Endings(self._settings)
        load = Load(self._client, answers, self._load_chance, self.adapters, self._poison, self._width)
        # A group shares the steps of runs alone.
        load.runs = 1 if self._ranks == 1 else 3
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load.feed()
            self.fleet.tend()
            self._decide()
            name, act = self._choose()
            if act():
                self.counts[name] += 1
            time.sleep(self._chance.uniform(0.2, 1.5))
        self.fleet.calm_down()
        load.wait_for_all()
        self.counts += Counter(jobs=load.jobs, entries=load.entries, cancelled=load.cancelled, refused=load.refused)
        self.counts["lettered"] += load.sent_again.total()
        wrong = load.wrong + self._reckon()
        endings.stop()
        # A dead letter is an end, and what is sent again has another.
        right = {keys.result(job_id): 1 + count for job_id, count in load.sent_again.items()}
        twice = {name: count for name, count in endings.heard.items() if count > right.get(name, 1)}
        return wrong + [f"{name} ended {count} times" for name, count in twice.items()]

    def _choose(self) -> tuple[str, Callable[[], bool]]:
        acts: dict[str, tuple[int, Callable[[], bool]]] = {
            "kill": (4, self._kill),
            "freeze": (3, self._freeze),
            "drain": (3, self._drain),
            "start": (2, self._start),
            "cut": (4, self._cut),
            "broker restart": (1, self._restart_broker),
            "broker silence": (1, self._silence_broker),
            "poison": (8, self._poisoned),
            "full disk": (1, self._fill_disk),
            "locked disk": (1, self._lock_disk),
        }
        if self._ranks > 1:
            acts |= {"rank kill": (3, self._kill_rank), "rank freeze": (3, self._freeze_rank)}
        name = self._chance.choices(list(acts), [weight for weight, _ in acts.values()])[0]
        return name, acts[name][1]

    def _poisoned(self) -> bool:
        try:
            return self._poison.strike()
        except RedisError:
            return False

    def _fill_disk(self) -> bool:
        self._disk.fill([pid for member in self.fleet.members if (pid := member.pid) is not None])
        return self._bear_and_mend()

    def _lock_disk(self) -> bool:
        locked = self._disk.lock()
        return self._bear_and_mend() and locked

    def _bear_and_mend(self) -> bool:
        time.sleep(self._chance.uniform(0.5, 4))
        self._disk.mend()
        return True

    def _kill(self) -> bool:
        if not self.fleet.awake:
            return False
        member = self._chance.choice(self.fleet.awake)
        member.asked_to_end = True
        return member.signal(signal.SIGKILL)

    def _freeze(self) -> bool:
        if not self.fleet.awake:
            return False
        member = self._chance.choice(self.fleet.awake)
        return member.freeze(member.pid, self._settings.lease + self._chance.uniform(1, 5))

    def _kill_rank(self) -> bool:
        group = self._group_awake()
        return group is not None and group.signal_last_rank(signal.SIGKILL)

    def _freeze_rank(self) -> bool:
        """For longer than the others wait for a sign of life, or not."""
        group = self._group_awake()
        return group is not None and group.freeze(group.last_rank, SILENCE * self._chance.uniform(0.5, 1.5))

    def _group_awake(self) -> Member | None:
        return next((member for member in self.fleet.awake if member.ranks > 1), None)

    def _drain(self) -> bool:
        if not self.fleet.awake:
            return False
        member = self._chance.choice(self.fleet.awake)
        member.asked_to_end = True
        member.draining = member.signal(signal.SIGTERM)
        return member.draining

    def _start(self) -> bool:
        if len(self.fleet.members) >= MOST - (self._ranks > 1):
            return False
        self.fleet.start()
        return True

    def _cut(self) -> bool:
        self.broker.drop_connections()
        return True

    def _restart_broker(self) -> bool:
        self.broker.kill()
        time.sleep(self._chance.uniform(0, 2))
        self.broker.start()
        self._client.redis.config_set("appendfsync", "always")
        return True

    def _silence_broker(self) -> bool:
        pid = self.broker.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._chance.uniform(1, 7))
        os.kill(pid, signal.SIGCONT)
        return True

    def _reckon(self) -> list[str]:
        """What is left though every job has ended."""
        redis, wrong = self._client.redis, []

        def left() -> dict[str, int]:
            sizes = {f"{keys.PREFIX}unacked": redis.hlen(f"{keys.PREFIX}unacked")}
            for queue in QUEUES:
                sizes[keys.ready(queue)] = redis.llen(keys.ready(queue))
                waiting = [keys.backlog(queue, priority) for priority in range(ledger.PRIORITIES)]
                sizes[keys.sizes(queue)] = redis.hlen(keys.sizes(queue))
                for key in (keys.dispatched(queue), keys.open_jobs(queue), keys.client("default", queue), *waiting):
                    sizes[key] = redis.zcard(key)
            return {key: size for key, size in sizes.items() if size}

        try:
            wait_until(lambda: not left(), "nothing is left in the queues", 60)
        except AssertionError:
            wrong.append(f"left in the queues: {left()}")
        wrong += self._poison.reckon() + self.fleet.ended_by_themselves
        return wrong + overlong_keys(redis)

    def close(self) -> list[str]:
        with ExitStack() as leaving:
            # Each, also where one of them fails; the fleet first.
            for end in (self.broker.close, self._client.close, self._disk.close, self.fleet.stop):
                leaving.callback(end)
            pid = self.broker.pid
        return [f"still runs: {line}" for line in self.fleet.left()] + (["the broker still runs"] if alive(pid) else [])
