"""The ledger: what the broker knows of each job, beyond its message. One Lua script a transition, so that each happens
whole or not at all, whoever dies in the middle.

A job's life: `submit` writes its record, then the client sends its message. A worker that gets the message calls
`claim`: it becomes the owner under a token of its own, unless the job has ended, another delivery of it runs, or it
has killed too many owners. When the worker is done it calls `settle`; when it gives the job back, `release`. An owner
whose message was given to another worker (it was frozen for longer than its lease) finds its token replaced: it is
fenced, and must leave no trace.

A message can be lost between the queue and a worker's memory, or a client can die before it sends it. `orphans` finds
records whose message is nowhere; sending it again is safe, because a second delivery of a running job is dropped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stoker import keys

#: Owners that a job may kill before it is put aside.
MAX_DEATHS = 3
#: Jobs that may wait in one queue before clients are told that it is full.
QUEUE_LIMIT = 20_000
#: kombu's name for the list of one priority of a queue is the queue's, this, and the priority; the first has no suffix.
PRIORITY_SEPARATOR = "\x06\x16"
PRIORITIES = 10

# Redis' own clock in every script: clients' and workers' clocks may differ.
_NOW = "local t = redis.call('TIME'); local now = tonumber(t[1]) + tonumber(t[2]) / 1e6\n"
_ENDED = """
local function ended(key)
  local record = redis.call('GET', key)
  if not record then return false end
  local status = cjson.decode(record)['status']
  return status == 'SUCCESS' or status == 'FAILURE' or status == 'REVOKED'
end
"""

SUBMIT = (
    _NOW
    + """
local job, open = KEYS[1], KEYS[2]
if redis.call('EXISTS', job) == 1 then return {'known', 0} end
local depth = 0
for i = 3, #KEYS do depth = depth + redis.call('LLEN', KEYS[i]) end
if depth >= tonumber(ARGV[2]) then return {'full', depth} end
local fields = cjson.decode(ARGV[3])
for name, value in pairs(fields) do redis.call('HSET', job, name, value) end
redis.call('HSET', job, 'submitted', string.format('%.6f', now))
redis.call('EXPIRE', job, ARGV[4])
redis.call('ZADD', open, now, ARGV[1])
redis.call('EXPIRE', open, ARGV[4])
return {'new', depth}
"""
)

CLAIM = (
    _NOW
    + _ENDED
    + """
local job = KEYS[1]
if ended(KEYS[2]) then return {'ended', '0', '0'} end
local state = redis.call('HMGET', job, 'token', 'tag', 'worker', 'submitted', 'history', 'began')
local verdict = 'run'
if state[1] then
  if state[2] ~= ARGV[2] then return {'duplicate', '0', '0'} end
  local history = state[5] and cjson.decode(state[5]) or {}
  table.insert(history, {worker = state[3], time = now})
  redis.call('HSET', job, 'history', cjson.encode(history))
  if #history >= tonumber(ARGV[4]) then verdict = 'dead' end
end
redis.call('HSET', job, 'token', ARGV[1], 'tag', ARGV[2], 'worker', ARGV[3], 'began', '1')
redis.call('EXPIRE', job, ARGV[5])
local age = state[4] and (now - tonumber(state[4])) or 0
return {verdict, string.format('%.6f', age), state[6] and '1' or '0'}
"""
)

RELEASE = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'token', 'tag', 'worker')
return 1
"""

SETTLE = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('HDEL', KEYS[1], 'request')
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('DEL', KEYS[3])
return 1
"""

CANCEL = (
    _ENDED
    + """
local job, result, mark = KEYS[1], KEYS[2], KEYS[3]
if ended(result) then return 'ended' end
if redis.call('EXISTS', job) == 0 then return 'unknown' end
redis.call('SET', mark, '1', 'EX', ARGV[3])
if redis.call('HGET', job, 'token') then
  redis.call('PUBLISH', KEYS[4], ARGV[1])
  return 'asked'
end
redis.call('SET', result, ARGV[2], 'EX', ARGV[4])
redis.call('PUBLISH', result, ARGV[2])
redis.call('EXPIRE', job, ARGV[4])
redis.call('ZREM', KEYS[5], ARGV[1])
return 'cancelled'
"""
)


@dataclass(frozen=True)
class Claim:
    """`state`: `run`, `ended`, `duplicate` or `dead`. `age`: seconds since submission. `resumed`: somebody began it."""

    state: str
    age: float
    resumed: bool

    @classmethod
    def parse(cls, reply: list[bytes]) -> Claim:
        return cls(reply[0].decode(), float(reply[1]), reply[2] == b"1")


def queue_keys(queue: str) -> list[str]:
    """The lists that kombu keeps for one queue, one a priority."""
    return [f"{keys.PREFIX}{queue}{f'{PRIORITY_SEPARATOR}{step}' if step else ''}" for step in range(PRIORITIES)]


def submit(redis: Any, job_id: str, record: dict[str, str], limit: int = QUEUE_LIMIT) -> Any:
    """Write a job's record: [`new` | `known` | `full`, jobs that wait before it]."""
    names = [keys.job(job_id), keys.open_jobs(record["queue"]), *queue_keys(record["queue"])]
    return redis.eval(SUBMIT, len(names), *names, job_id, limit, json.dumps(record), keys.PENDING_TTL)


def claim(redis: Any, job_id: str, token: str, tag: str, worker: str) -> Any:
    """Ask to own a job, under `token`, for the message with delivery tag `tag`. `Claim.parse` reads the reply."""
    names = [keys.job(job_id), keys.result(job_id)]
    return redis.eval(CLAIM, len(names), *names, token, tag, worker, MAX_DEATHS, keys.PENDING_TTL)


def release(redis: Any, job_id: str, token: str) -> Any:
    """Give a job back, alive: that its owner goes away is not held against the job."""
    return redis.eval(RELEASE, 1, keys.job(job_id), token)


def settle(redis: Any, job_id: str, queue: str, token: str) -> Any:
    """Say that the job has ended: 1, or 0 for an owner that was fenced."""
    names = [keys.job(job_id), keys.open_jobs(queue), keys.cancel(job_id)]
    return redis.eval(SETTLE, len(names), *names, token, job_id, keys.RESULT_TTL)


def cancel(redis: Any, job_id: str, queue: str) -> Any:
    """Cancel a job: `cancelled` (it waited, and has ended), `asked` (its owner stops it), `ended`, `unknown`."""
    names = [keys.job(job_id), keys.result(job_id), keys.cancel(job_id), keys.CANCELS, keys.open_jobs(queue)]
    record = json.dumps(_revoked(job_id))
    return redis.eval(CANCEL, len(names), *names, job_id, record, keys.PENDING_TTL, keys.RESULT_TTL)


def bury(redis: Any, job_id: str) -> list[dict[str, Any]]:
    """Put a job that killed too many owners aside, and return their history. For a blocking client."""
    raw = redis.hgetall(keys.job(job_id))
    record = {name.decode(): value.decode() for name, value in raw.items()}
    history: list[dict[str, Any]] = json.loads(record.get("history", "[]"))
    letter = {name: record.get(name, "") for name in ("kind", "model", "request")} | {"history": history}
    pipeline = redis.pipeline()
    pipeline.hset(keys.DEAD, job_id, json.dumps(letter))
    pipeline.expire(keys.DEAD, keys.DEAD_TTL)
    pipeline.execute()
    return history


def forget(pipeline: Any, job_id: str) -> Any:
    """Take a dead letter back, with all that says that the job has ended, so that it can be submitted again."""
    pipeline.hdel(keys.DEAD, job_id)
    pipeline.delete(keys.job(job_id), keys.result(job_id), keys.cancel(job_id))
    return pipeline


def _revoked(job_id: str) -> dict[str, Any]:
    """What Celery's own backend stores for a revoked task."""
    return {
        "status": "REVOKED",
        "result": {"exc_type": "TaskRevokedError", "exc_message": ["cancelled"], "exc_module": "celery.exceptions"},
        "traceback": None,
        "children": [],
        "date_done": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "task_id": job_id,
    }


def open_jobs(redis: Any, queues: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Jobs of `queues` that have not ended, oldest first: id → kind, model, age, worker. For a blocking client."""
    now = _server_time(redis)
    found = [entry for queue in queues for entry in redis.zrange(keys.open_jobs(queue), 0, -1, withscores=True)]
    found.sort(key=lambda entry: entry[1])
    pipeline = redis.pipeline()
    for job_id, _ in found:
        pipeline.hmget(keys.job(job_id.decode()), "kind", "model", "worker")
    listed = {}
    for (job_id, submitted), values in zip(found, pipeline.execute(), strict=True):
        fields = zip(("kind", "model", "worker"), values, strict=True)
        record: dict[str, Any] = {name: value.decode() for name, value in fields if value is not None}
        if record:
            listed[job_id.decode()] = record | {"age": max(0.0, now - submitted)}
    return listed


def orphans(redis: Any, queue: str, older_than: float) -> list[str]:
    """Jobs of `queue` that nobody owns and whose message is not waiting. For a blocking client.

    Looks only while the queue is empty: then every open job should have an owner. `older_than`: seconds since the
    submission, long enough for a message on its way.
    """
    pipeline = redis.pipeline()
    for name in queue_keys(queue):
        pipeline.llen(name)
    pipeline.zrangebyscore(keys.open_jobs(queue), "-inf", _server_time(redis) - older_than)
    *depths, waiting = pipeline.execute()
    if any(depths) or not waiting:
        return []
    ids = [job_id.decode() for job_id in waiting]
    pipeline = redis.pipeline()
    for job_id in ids:
        pipeline.hmget(keys.job(job_id), "token", "request")
    states = pipeline.execute()
    forgotten = [job_id for job_id, (_, request) in zip(ids, states, strict=True) if request is None]
    if forgotten:
        redis.zrem(keys.open_jobs(queue), *forgotten)
    return [job_id for job_id, (token, request) in zip(ids, states, strict=True) if request and not token]


def _server_time(redis: Any) -> float:
    seconds, micros = redis.time()
    return float(seconds) + float(micros) / 1e6
