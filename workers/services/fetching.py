"""Adapters from the artifact store to this worker's disk."""

from __future__ import annotations

import logging
from pathlib import Path

from stoker.contract import bundle
from stoker.errors import UnknownAdapter
from workers.artifacts import Artifacts
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)


def fetch(runtime: Runtime, model: str, name: str, version: int) -> None:
    """Let this disk have the files of a version. Raises `UnknownAdapter` where no store has them, and what the store
    raises."""
    store = runtime.engine.store
    if store.has(model, name, version):
        return
    data = Artifacts(runtime.settings, runtime.redis).get(model, name, version)
    if data is None:
        raise UnknownAdapter(
            f"adapter '{name}@{version}' given; it is registered, but no store that this worker reaches has its files."
        )
    store.install(model, name, lambda draft: write_files(draft, data, f"{name}@{version}"), version)
    log.info("adapter %s@%d of %s fetched", name, version, model)


def write_files(folder: Path, data: bytes, source: str) -> None:
    """The files of an adapter that travelled as one. Raises `InvalidRequest` for what is none, naming `source`."""
    for file, content in bundle.unpack(data, source).items():
        (folder / file).write_bytes(content)
