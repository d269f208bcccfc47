"""What another program might write into the broker while the storm lasts: messages, values and keys that are none of
Stoker's. Each hurts itself alone."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

from stoker import Client
from stoker.broker import keys, letters
from stoker.broker.envelope import envelope
from stoker.client import GenerateJob
from stoker.errors import JobFailed, StokerError
from tests.chaos.fleet import GENERATE
from tests.wrong_types import TYPES, write
from workers.services import mending

#: Seconds in which a job that was spoiled has to fail once the storm is over.
FAILS_WITHIN = 60.0


def _differing(number: int, **changes: object) -> bytes:
    job_id = f"nobody-{number}"
    made = json.loads(envelope(job_id, "generate", GENERATE, keys.queue(GENERATE, "generate")))
    made["properties"]["delivery_tag"] = f"{job_id}#1"
    made["headers"] |= changes
    return json.dumps(made).encode()


MESSAGES: tuple[Callable[[int], bytes], ...] = (
    lambda number: b"garbage %d" % number,
    lambda number: b"\xff\xfe %d" % number,
    lambda number: b"[" * (1000 + number),
    lambda number: json.dumps({"headers": {"id": number}}).encode(),
    lambda number: _differing(number, eta="2099-01-01T00:00:00+00:00"),
    lambda number: _differing(number, task="os.system"),
    lambda number: _differing(number, timelimit=["x", "y"]),
)


class Poison:
    """`strike` writes one such thing; `reckon` says what else it hurt, once all is over."""

    def __init__(self, client: Client, queues: Sequence[str], chance: random.Random) -> None:
        self._client, self._queues, self._chance = client, list(queues), chance
        self._shared = dict(mending.SHARED)
        for queue in queues:
            self._shared |= mending.keys_of(queue)
        #: Whether what an operator decided was lost, and the dead letters.
        self.policy_lost = self.letters_lost = False
        self._number = 0
        self._sent: set[bytes] = set()
        self._spoiled: list[GenerateJob] = []

    def strike(self) -> bool:
        self._number += 1
        act = self._chance.choice(
            (self._message, self._message, self._value, self._held, self._job, self._type, self._type, self._member)
        )
        try:
            act()
        except StokerError:
            # The broker is away: then this one was not done.
            return False
        return True

    def _message(self) -> None:
        raw = self._chance.choice(MESSAGES)(self._number)
        self._sent.add(raw[: letters.KEPT])
        push = self._chance.choice((self._client.redis.lpush, self._client.redis.rpush))
        push(keys.ready(self._chance.choice(self._queues)), raw)

    def _value(self) -> None:
        redis = self._client.redis
        redis.publish(keys.CANCELS, b"\xff")
        redis.publish(f"{keys.PREFIX}/0.celery.pidbox", self._chance.choice(("[]", "{}", "garbage", b"\xff")))
        redis.hset(keys.MODELS, f"evil-{self._number}", self._chance.choice((b"garbage", b"{}", b"\xff")))
        redis.delete(keys.JANITOR)
        redis.set(keys.JANITOR, "a turn that never expires")

    def _type(self) -> None:
        """A key that all jobs share holds another type, and what was in it is lost."""
        key = self._chance.choice(list(self._shared))
        kind = self._chance.choice([kind for kind in TYPES if kind != self._shared[key]])
        self.policy_lost |= key == keys.POLICY
        self.letters_lost |= key == keys.DEAD
        write(self._client.redis, key, kind, b"poison %d" % self._number, lives=None)

    def _member(self) -> None:
        """Garbage among what is right, in a hash or an order that all jobs share."""
        redis, queue = self._client.redis, self._chance.choice(self._queues)
        name, value = self._chance.choice((b"\xff", b"crashes", b":sum", b"served", b"evil")), b"-9%d" % self._number
        match self._chance.choice(("hash", "order", "letter")):
            case "hash":
                of_queue = self._chance.choice((keys.turns, keys.pace, keys.sizes))(queue)
                key = self._chance.choice((keys.POLICY, of_queue, of_queue))
                self.policy_lost |= key == keys.POLICY
                redis.hset(key, name, value)
            case "order":
                key = self._chance.choice((keys.open_jobs, keys.dispatched, partial(keys.backlog, priority=5)))(queue)
                score = self._chance.choice((0.0, -1.0, 1e18, float("inf"), time.time()))
                redis.zadd(key, {self._chance.choice((b"\xff", b"nobody-%d" % self._number)): score})
            case "letter":
                self._sent.add(value)
                redis.hset(keys.DEAD, b"evil-%d" % self._number, value)

    def _held(self) -> None:
        """As if a dead worker had held it."""
        raw, tag = b"garbage %d that is held" % self._number, f"nobody-{self._number}#1"
        self._sent.add(raw)
        pipeline = self._client.redis.pipeline()
        pipeline.hset(keys.UNACKED, tag, raw)
        pipeline.zadd(f"{keys.PREFIX}unacked_index", {tag: 1.0})
        pipeline.execute()

    def _job(self) -> None:
        """A job whose stream is a string."""
        job_id = f"spoiled-{self._number}"
        self._client.redis.set(keys.stream(job_id), "x", ex=keys.RESULT_TTL)
        self._spoiled.append(self._client.generate("ab", model=GENERATE, max_tokens=50, job_id=job_id))

    def reckon(self) -> list[str]:
        return [*self._wrong_letters(), *self._wrong_ends()]

    def _wrong_letters(self) -> list[str]:
        wrong = []
        for name, letter in self._client.dead().items():
            if letter["kind"] != letters.MESSAGE or base64.b64decode(letter["message"]) not in self._sent:
                wrong.append(f"a dead letter: {name} {letter}")
        return wrong

    def _wrong_ends(self) -> list[str]:
        wrong = []
        for job in self._spoiled:
            try:
                wrong.append(f"{job.id} has a result though its stream is none: {job.result(FAILS_WITHIN)}")
            except JobFailed as error:
                if keys.stream(job.id) not in str(error):
                    wrong.append(f"{job.id} failed without naming its key: {error}")
            except StokerError as error:
                wrong.append(f"{job.id}: {type(error).__name__}: {error}")
        return wrong
