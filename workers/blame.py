"""Which key is to blame when the broker refuses a command for the type of a value: its answer does not say."""

from __future__ import annotations

from typing import Any

from redis.exceptions import RedisError

from stoker.broker import keys
from workers.services.mending import SHARED, keys_of


def blame(redis: Any, job_id: str, queue: str, error: BaseException) -> str:
    """`error` in words that name the keys of the job and its queue which hold something else than they should."""
    wrong = _wrong_types(redis, job_id, queue) if "WRONGTYPE" in str(error) else []
    what = f"the broker refused it ({error})"
    if not wrong:
        return what
    return f"{what}: {'; '.join(wrong)}. Something else than Stoker wrote there: delete it, and send the job again"


def _wrong_types(redis: Any, job_id: str, queue: str) -> list[str]:
    own = {keys.job(job_id): "hash", keys.result(job_id): "string", keys.stream(job_id): "stream"}
    right = own | SHARED | keys_of(queue)
    pipeline = redis.pipeline(transaction=False)
    for key in right:
        pipeline.type(key)
    try:
        found = dict(zip(right, [kind.decode() for kind in pipeline.execute()], strict=True))
    except RedisError:
        return []
    return [f"the key {key} is a {found[key]}, not a {kind}" for key, kind in right.items()
            if found[key] not in (kind, "none")]  # fmt: skip
