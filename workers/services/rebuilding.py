"""What a key held that another program wrote over, as far as other keys still say it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from redis.exceptions import ResponseError

from stoker.broker import keys, ledger, registry
from stoker.broker.ledger import record
from stoker.broker.trouble import forbids
from stoker.contract.names import Rule, follows

log = logging.getLogger(__name__)

#: Keys of the broker that one step of a scan looks at, and records that are read at once.
AT_ONCE = 1000


def gathered(redis: Any, key: str) -> dict[str, float]:
    """Members of `key` and their scores, for a set 0. While the key holds another type nobody can add to it, and no job
    whose id it holds can end: what is gathered stays true until it is written."""
    kind = keys.kind_of(key)
    if kind is not None and kind.name == "adapters":
        return dict.fromkeys(_adapters(redis, key.removeprefix(keys.adapters(""))), 0.0)
    if kind is not None and kind.name == "open":
        return _open_jobs(redis, key.removeprefix(keys.open_jobs("")))
    return {}


def _adapters(redis: Any, model: str) -> list[str]:
    """The names whose records are there."""
    prefix = keys.adapter(model, "")
    try:
        found = list(redis.scan_iter(match=f"{prefix}*", count=AT_ONCE, _type="hash"))
    except ResponseError as error:
        if not forbids(error):
            raise
        log.error(
            "the list of adapters of %s begins anew: this user may not look for their records (+scan). Each adapter "
            "serves on, and is in the list again once it is loaded or trained again.", model,
        )  # fmt: skip
        return []
    return registry.names(name.removeprefix(prefix.encode()) for name in found)


def _open_jobs(redis: Any, queue: str) -> dict[str, float]:
    """Every open job has a size, and is dispatched or waits in the backlog."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.hkeys(keys.sizes(queue))
    pipeline.zrange(keys.dispatched(queue), 0, -1)
    for priority in range(ledger.PRIORITIES):
        pipeline.zrange(keys.backlog(queue, priority), 0, -1)
    replies = pipeline.execute(raise_on_error=False)
    raw = {job_id for reply in replies if isinstance(reply, list) for job_id in reply}
    known = (job_id.decode(errors="replace") for job_id in raw)
    return dict(_submitted(redis, queue, (job_id for job_id in known if follows(Rule.JOB_ID, job_id))))


def _submitted(redis: Any, queue: str, job_ids: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Those that are open jobs of the queue, each with the time when it was submitted."""
    rest = iter(job_ids)
    while some := list(islice(rest, AT_ONCE)):
        pipeline, calls = redis.pipeline(transaction=False), [record.open_since(job_id, queue) for job_id in some]
        for call in calls:
            call.send(pipeline)
        replies = pipeline.execute(raise_on_error=False)
        for job_id, call, reply in zip(some, calls, replies, strict=True):
            submitted = call.parse(reply)
            if submitted is not None:
                yield job_id, submitted
