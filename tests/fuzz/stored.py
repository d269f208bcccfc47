"""Wrong types and bytes at every key of `stoker/keys.py`: those of one job, and those that all share."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from stoker.broker import keys, prefixes
from stoker.broker.ledger.record import Field
from stoker.client import GenerateJob, Job
from stoker.errors import BrokerUnavailable, JobError, JobTimeout, StokerError, UnknownModel
from tests.chaos.fleet import EMBED, GENERATE
from tests.fuzz import odd
from tests.fuzz.input import Input
from tests.fuzz.world import QUEUES, REFUSED, World, as_json
from tests.wrong_types import TYPES, write

#: What a job may end with whose own keys were spoiled, and a reader of such keys.
SPOILED: tuple[type[StokerError], ...] = (*REFUSED, JobError, BrokerUnavailable)
#: Seconds that a value lives which is put where a job's own would.
LIVES = 600
#: Seconds until a worker goes on that found a key spoiled which all share.
MENDED_WITHIN = 30.0
#: A raw value in a hash or a set that all share → what it is.
SHARED_HASHES = (
    keys.MODELS,
    keys.DEAD,
    keys.POLICY,
    keys.prefixes(GENERATE),
    *(f(queue) for queue in QUEUES for f in (keys.turns, keys.pace, keys.sizes)),
)
SHARED_ORDERS = (
    keys.WORKERS, f"{keys.UNACKED}_index",
    *(f(queue) for queue in QUEUES for f in (keys.dispatched, keys.open_jobs, lambda queue: keys.backlog(queue, 5))),
)  # fmt: skip
SCORES = (0.0, -1.0, 1e18, float("inf"), float("-inf"), 1e9)
NAMES = (
    "ageing", "queue_limit", "client_limit", "crashes", "client_limit:default", "now:5", "next:5:default", "served",
    "served:5",
    ":changed", "last", "interval", "tiny-decoder/1", "tiny-encoder/1", "evil/1", "a", "",
)  # fmt: skip


def draw(chance: random.Random, number: int) -> Input:
    sources = (_own_type, _own_field, _read, _adapter, _shared_value, _pinned, _shared_type)
    return chance.choices(sources, (5, 6, 5, 3, 1.5, 1.0, 0.4))[0](chance, number)


def _value(chance: random.Random) -> bytes:
    return as_json(odd.json_value(chance))[:20_000] if chance.random() < 0.5 else odd.some_bytes(chance, 60)


def _job(world: World, kind: str, job_id: str) -> Job[Any]:
    if kind == "embed":
        return world.client.embed(["ab", "ab ab"], model=EMBED, job_id=job_id)
    if kind == "generate":
        return world.client.generate("ab", model=GENERATE, max_tokens=60, job_id=job_id)
    rows = [{"text": "ab ab"}]
    return world.client.train(
        job_id, rows, model=GENERATE, steps=2, rank=2, max_length=16, promote=False, job_id=job_id
    )


def _own_keys(job_id: str) -> tuple[str, ...]:
    named = (keys.job, keys.result, keys.stream, keys.cancel)
    return (*(name(job_id) for name in named), keys.blob(keys.vectors(job_id)))


def _forget(world: World, job_id: str) -> None:
    """What one job leaves whose record was spoiled. Its input is known by the record alone, and would expire."""
    inputs = world.client.redis.scan_iter(match=keys.blob(f"*:{job_id}:*"), count=1000)
    world.client.redis.delete(*_own_keys(job_id), *inputs)


def _own_type(chance: random.Random, number: int) -> Input:
    """A key of a job holds another type, before the job is sent or after that."""
    job_id, kind = f"k{number}", chance.choice(("generate", "embed", "train"))
    key, written, value = chance.choice(_own_keys(job_id)), chance.choice(TYPES), _value(chance)
    later = chance.random() < 0.6
    pause = chance.choice((0.0, 0.002, 0.01, 0.03))

    def act(world: World) -> list[str]:
        def call() -> Job[Any]:
            if not later:
                write(world.client.redis, key, written, value, LIVES)
            job = _job(world, kind, job_id)
            if later:
                time.sleep(pause)
                write(world.client.redis, key, written, value, LIVES)
            return job

        wrong = world.judged(call, SPOILED)
        _forget(world, job_id)
        return wrong

    return Input(
        f"{key} is a {written} of {odd.shown(value, 80)}, {'after' if later else 'before'} the job is sent", act
    )


def _own_field(chance: random.Random, number: int) -> Input:
    """A field of a job's record holds something else."""
    job_id, kind, field = f"r{number}", chance.choice(("generate", "embed", "train")), chance.choice(tuple(Field))
    value = _value(chance) if chance.random() < 0.7 else str(chance.choice(odd.NUMBERS)).encode()
    deleted, pause = chance.random() < 0.2, chance.choice((0.0, 0.0, 0.01))

    def act(world: World) -> list[str]:
        redis = world.client.redis

        def call() -> Job[Any]:
            job = _job(world, kind, job_id)
            time.sleep(pause)
            redis.hdel(keys.job(job_id), field) if deleted else redis.hset(keys.job(job_id), field, value)
            redis.expire(keys.job(job_id), LIVES)
            return job

        wrong = world.judged(call, SPOILED)
        _forget(world, job_id)
        return wrong

    what = "is gone" if deleted else f"is {odd.shown(value, 120)}"
    return Input(f"field {field} of the record of {job_id} ({kind}) {what}", act)


def _read(chance: random.Random, number: int) -> Input:
    """What a client reads of a job that has ended: its record, result and stream were written by another program."""
    job_id, kind = f"read-{number}", chance.choice(("generate", "embed", "train", "adapters", "evil"))
    status = chance.choice(("SUCCESS", "FAILURE", "REVOKED", "STARTED", None, 5))
    fields = {
        "exc_type": chance.choice(("SystemExit", "JobDead", "QueueFull", 5)),
        "exc_message": odd.json_value(chance),
    }
    record = {"status": status, "result": chance.choice((fields, odd.json_value(chance)))}
    result = chance.choice((as_json(record), as_json(record), _value(chance)))
    entry, at = _value(chance), f"{chance.choice((1, 2, 5, 2**63))}-0"

    def act(world: World) -> list[str]:
        redis = world.client.redis
        redis.hset(keys.job(job_id), mapping={"kind": kind, "queue": QUEUES[0]})
        redis.set(keys.result(job_id), result)
        redis.xadd(keys.stream(job_id), {"entry": entry}, id=at)
        for key in _own_keys(job_id):
            redis.expire(key, LIVES)

        def follow() -> None:
            job = world.client.job(job_id)
            job.status()
            if isinstance(job, GenerateJob):
                list(job.stream(timeout=0.5))
            job.result(0.5)

        wrong = world.judged(follow, (*SPOILED, StokerError))
        _forget(world, job_id)
        return wrong

    return Input(f"a reader of {kind}: result {odd.shown(result)}, entry {odd.shown(entry, 100)} at {at}", act)


def _adapter(chance: random.Random, number: int) -> Input:
    """The registry's hash of one adapter, and the files of its version."""
    name, uses = f"f{number}", chance.choice(("generate", "train"))
    sound: dict[str, Any] = {"next": "1", "serving": "1", "history": "[]", "version:1": json.dumps({"rank": 2})}
    field = chance.choice((*sound, "version:x", "version:0", "version:99999999999999999999", ""))
    fields = sound | {field: chance.choice((_value(chance), str(chance.choice(odd.NUMBERS)).encode()))}
    files, typed = _value(chance), chance.choice(TYPES) if chance.random() < 0.15 else None

    def act(world: World) -> list[str]:
        key = keys.adapter(GENERATE, name)
        redis: Any = world.client.redis
        if typed:
            write(redis, key, typed, files, lives=None)
        else:
            redis.hset(key, mapping=fields)
        redis.set(keys.artifact(GENERATE, name, 1), files)
        try:
            if uses == "train":
                rows = [{"text": "ab"}]
                return world.judged(
                    lambda: world.client.train(name, rows, model=GENERATE, steps=1, rank=2, max_length=16), SPOILED
                )
            wrong = world.judged(lambda: world.client.adapters.get(name, GENERATE), SPOILED)
            wrong += world.judged(lambda: world.client.adapters.rollback(name, GENERATE), SPOILED)
            return wrong + world.judged(
                lambda: world.client.generate("ab", model=GENERATE, adapter=name, max_tokens=2), SPOILED
            )
        finally:
            redis.delete(key, keys.artifact(GENERATE, name, 1))

    return Input(
        f"an adapter with {odd.shown(fields)}{' of another type' if typed else ''}, files {odd.shown(files, 60)}", act
    )


def _shared_value(chance: random.Random, number: int) -> Input:
    """A field or a member that nobody wrote, in what all jobs share. What could be a decision of the operator's counts
    as one, so it is taken away again."""
    value, score = _value(chance), chance.choice(SCORES)
    if chance.random() < 0.5:
        key, name = chance.choice(SHARED_HASHES), chance.choice(NAMES) if chance.random() < 0.7 else _value(chance)
        return Input(
            f"{key} has {odd.shown(name, 60)}: {odd.shown(value)}",
            lambda world: _in_hash(world, key, name, value),
            True,
        )
    key, member = chance.choice(SHARED_ORDERS), chance.choice((value, f"ghost-{number}".encode()))
    return Input(
        f"{key} has {odd.shown(member, 100)} at {score}", lambda world: _in_order(world, key, member, score), True
    )


def _pinned(chance: random.Random, number: int) -> Input:
    """A pinned prefix in its form, of anything: the worker keeps it, or says why it does not."""
    fields: dict[str, Any] = {"id": f"{number:032x}", "time": 1.0, "client": "default"}
    fields |= {
        name: odd.json_value(chance) for name in ("tools", "template", "adapter", "time") if chance.random() < 0.2
    }
    of = chance.choice(("prompt", "prompt_ids", "messages"))
    whole = {"prompt": "ab " * 50, "prompt_ids": [5] * 50, "messages": [{"role": "system", "content": "ab " * 50}]}
    fields[of] = odd.spoiled(chance, whole[of]) if chance.random() < 0.5 else whole[of]
    name = f"p{number}"

    def act(world: World) -> list[str]:
        redis: Any = world.client.redis
        prefixes.pin(redis.pipeline(), GENERATE, name, as_json(fields).decode()).execute()
        wrong = _goes_on(world) + _is_answered(world, name)
        prefixes.unpin(redis.pipeline(), GENERATE, name).execute()
        return wrong

    return Input(f"a pinned prefix of {odd.shown(fields)}", act, True)


def _is_answered(world: World, name: str) -> list[str]:
    """What is wrong where the worker says nothing of a prefix that can be read."""
    end = time.monotonic() + MENDED_WITHIN
    while True:
        said = [entry.workers for entry in world.client.prefixes.list(GENERATE) if entry.name == name]
        if all(said):
            return []
        if time.monotonic() > end:
            return [f"the worker says nothing of the pinned prefix {name}"]
        time.sleep(0.1)


def _in_hash(world: World, key: str, name: str | bytes, value: bytes) -> list[str]:
    redis = world.client.redis
    before = redis.hget(key, name)
    redis.hset(key, name, value)
    if not keys.is_durable(key):
        redis.expire(key, LIVES)
    wrong = _goes_on(world)
    redis.hdel(key, name) if before is None else redis.hset(key, name, before)
    return wrong


def _in_order(world: World, key: str, member: bytes, score: float) -> list[str]:
    redis = world.client.redis
    redis.zadd(key, {member: score})
    if not keys.is_durable(key):
        redis.expire(key, LIVES)
    wrong = _goes_on(world)
    redis.zrem(key, member)
    return wrong


SHARED_TYPES: dict[str, str] = {
    keys.MODELS: "hash", keys.WORKERS: "zset", keys.POLICY: "hash", keys.DEAD: "hash", keys.UNACKED: "hash",
    f"{keys.UNACKED}_index": "zset", f"{keys.UNACKED}_mutex": "string", keys.JANITOR: "string",
    keys.adapters(GENERATE): "set", keys.prefixes(GENERATE): "hash",
    **{keys.ready(queue): "list" for queue in QUEUES}, **{keys.open_jobs(queue): "zset" for queue in QUEUES},
    **{keys.dispatched(queue): "zset" for queue in QUEUES}, **{keys.turns(queue): "hash" for queue in QUEUES},
    **{keys.pace(queue): "hash" for queue in QUEUES}, **{keys.sizes(queue): "hash" for queue in QUEUES},
    **{keys.backlog(queue, 5): "zset" for queue in QUEUES},
    **{keys.client("default", queue): "zset" for queue in QUEUES},
    **{f"{keys.PREFIX}_kombu.binding.{queue}": "set" for queue in QUEUES},
    f"{keys.PREFIX}_kombu.binding.celery.pidbox": "set",
}  # fmt: skip


def _shared_type(chance: random.Random, number: int) -> Input:
    """A key that all jobs share holds another type, while the stream goes on and its message is held."""
    key = chance.choice(tuple(SHARED_TYPES))
    written, value = chance.choice([kind for kind in TYPES if kind != SHARED_TYPES[key]]), _value(chance)

    def act(world: World) -> list[str]:
        redis: Any = world.client.redis
        kept = redis.dump(key)
        write(redis, key, written, value, lives=None)
        wrong = _goes_on(world)
        if redis.type(key).decode() not in (SHARED_TYPES[key], "none"):
            # A key that stops no work need not be moved aside.
            redis.delete(key)
            if kept is not None:
                redis.restore(key, 0, kept)
        for aside in redis.scan_iter(match=keys.spoiled("*")):
            redis.delete(aside)
        return wrong

    return Input(f"{key} is a {written} of {odd.shown(value, 100)}", act, alone=True)


def _goes_on(world: World) -> list[str]:
    """Jobs of each kind that are sent now end well, once what is spoiled is moved aside; what a client hears meanwhile
    names it."""
    end, last = time.monotonic() + MENDED_WITHIN, ""
    for kind in ("generate", "embed", "train"):
        while True:
            try:
                _job(world, kind, f"on-{kind}-{time.monotonic_ns()}").result(ENDS)
                break
            except (BrokerUnavailable, UnknownModel, JobTimeout, JobError) as error:
                last = f"{type(error).__name__}: {error}"
            if time.monotonic() > end:
                return [f"a job of kind {kind} does not end well: {last}"]
            time.sleep(0.1)
    return []


#: Seconds that a job may take which is sent while a shared key is spoiled: its message may be lost with it.
ENDS = 8.0
