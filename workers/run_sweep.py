"""Deleting the parts that runs have left in a store that is no broker: of a run that was cancelled while no worker had
it, or whose worker died right behind its end."""

from __future__ import annotations

import logging
from typing import Any

from stoker.broker import keys
from stoker.contract.names import Rule, follows
from stoker.settings import Settings
from workers import clock
from workers.artifacts import RUNS, Artifacts, StoreTrouble
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)


def round_of(runtime: Runtime) -> None:
    for job_id in sweep(runtime.settings, runtime.redis, clock.behind(runtime.redis)):
        log.info("job %s: its checkpoints were deleted from the store; the run has ended", job_id)


def sweep(settings: Settings, redis: Any, now: float) -> list[str]:
    """Delete those of runs that nobody goes on with; return their ids. A folder may be that of another broker's run, or
    its first checkpoint may be on its way: then it has no manifest here, and goes when it is older than any may be."""
    store = Artifacts(settings, redis)
    home = store.folder(RUNS)
    gone = []
    for job_id in home.names() if home is not None else ():
        folder = store.folder(f"{RUNS}/{job_id}")
        if folder is None or not follows(Rule.JOB_ID, job_id) or redis.exists(keys.checkpoint(job_id)):
            continue
        try:
            ended = redis.exists(keys.result(job_id)) or folder.changed() < now - keys.DEAD_TTL
        except StoreTrouble as error:
            # Another user's, in a folder that users share: the others go all the same.
            log.warning("job %s: whether its checkpoints are needed cannot be seen: %s", job_id, error)
            continue
        if ended:
            folder.clear()
            gone.append(job_id)
    return gone
