"""Deleting the files of adapters' versions that were taken out of the registry: nothing can ask for them any more."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from redis.exceptions import ResponseError

from stoker.broker import keys, registry
from stoker.broker.wrong_types import is_wrong_type
from stoker.contract.names import Rule, follows
from stoker.files.durable import remove_folder
from workers import clock
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: Seconds for which the files stay: `stoker adapters load` may take them into the registry again.
STAY = 24 * 3600.0


def round_of(runtime: Runtime) -> None:
    for folder in sweep(runtime.settings.adapters, runtime.redis):
        log.info("%s: removed, for the version was unloaded", folder)


def sweep(root: Path, redis: Any) -> list[Path]:
    """Delete them below `root`, the folder of an `AdapterStore`; return those that went. What the registry of this
    broker does not know stays: it may be there nowhere else."""
    now, gone = clock.now(redis), []
    for home in sorted(root.glob("*/*")):
        model, name = home.parts[-2:]
        if not (home.is_dir() and follows(Rule.NAME, model) and follows(Rule.NAME, name)):
            continue
        for version, since in sorted(_unloaded(redis, model, name).items()):
            folder = home / str(version)
            if since < now - STAY and folder.is_dir():
                remove_folder(folder)
                gone.append(folder)
    return gone


def _unloaded(redis: Any, model: str, name: str) -> dict[int, float]:
    try:
        return registry.unloaded(redis.hgetall(keys.adapter(model, name)))
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        # Another program's: it says nothing of this adapter, and hinders no other.
        return {}
