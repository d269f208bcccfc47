"""Deleting the files of adapters' versions that were taken out of the registry: nothing can ask for them any more."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from redis.exceptions import ResponseError

from stoker.broker import keys, registry
from stoker.broker.wrong_types import is_wrong_type
from stoker.contract.names import Rule, follows
from stoker.files.durable import remove_folder
from workers import clock
from workers.artifacts import SUFFIX, Artifacts
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: Seconds for which the files stay: `stoker adapters load` may take them into the registry again.
STAY = 24 * 3600.0


def round_of(runtime: Runtime) -> None:
    for folder in sweep(runtime.settings.adapters, runtime.redis):
        log.info("%s: removed, for the version was unloaded", folder)
    store, models = Artifacts(runtime.settings, runtime.redis), [card.model for card in runtime.engine.cards]
    for name in sweep_store(store, models, runtime.redis):
        log.info("%s: removed from the artifact store, for the version was unloaded", name)


def sweep(root: Path, redis: Any) -> list[Path]:
    """Delete them below `root`, the folder of an `AdapterStore`; return those that went. What the registry of this
    broker does not know stays: it may be there nowhere else."""
    now, gone = clock.now(redis), []
    for home in sorted(root.glob("*/*")):
        model, name = home.parts[-2:]
        if not (home.is_dir() and follows(Rule.NAME, model) and follows(Rule.NAME, name)):
            continue
        for version in _unloaded(redis, model, name, now - STAY):
            folder = home / str(version)
            if folder.is_dir():
                remove_folder(folder)
                gone.append(folder)
    return gone


def sweep_store(store: Artifacts, models: Iterable[str], redis: Any) -> list[str]:
    """The same in the store that STOKER_ARTIFACTS names, of the adapters of `models`; the broker deletes its own as
    they are unloaded. Raises `StoreTrouble`."""
    before, gone = clock.now(redis) - STAY, []
    for model in models:
        home = store.folder(model)
        for name in home.names() if home is not None else ():
            due = [f"{version}{SUFFIX}" for version in _unloaded(redis, model, name, before)]
            folder = store.folder(f"{model}/{name}") if due and follows(Rule.NAME, name) else None
            if folder is None:
                continue
            there = {*folder.names()}
            found = [file for file in due if file in there]
            folder.remove(found)
            gone += [f"{model}/{name}/{file}" for file in found]
    return gone


def _unloaded(redis: Any, model: str, name: str, before: float) -> list[int]:
    """The versions that were unloaded before that moment."""
    try:
        found = registry.unloaded(redis.hgetall(keys.adapter(model, name)))
        return sorted(version for version, since in found.items() if since < before)
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        # Another program's: it says nothing of this adapter, and hinders no other.
        return []
