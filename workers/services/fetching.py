"""Adapters from the artifact store to this worker's disk."""

from __future__ import annotations

import logging
from pathlib import Path

from stoker.broker import registry
from stoker.contract import bundle
from stoker.errors import UnknownAdapter
from workers.artifacts import Artifacts
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

_REPLACED = "adapter %s@%d of %s: files here were of the job %r, those of the registry are of %r; the first are in %s"


def fetch(runtime: Runtime, model: str, name: str, version: int) -> None:
    """Let this disk have the files of a version, those that the registry means. Raises `UnknownAdapter` where no store
    has them, and what the store raises."""
    store, maker = runtime.engine.store, None
    if store.has(model, name, version):
        maker = registry.maker(runtime.redis, model, name, version)
        if not _is_of_another(runtime, model, name, version, maker):
            # Another worker of this home may have put them there.
            runtime.engine.check_files(model, name, version)
            return
    data = Artifacts(runtime.settings, runtime.redis).get(model, name, version)
    if data is None:
        raise UnknownAdapter(
            f"adapter '{name}@{version}' given; it is registered, and no store that this worker reaches has its files."
        )
    free_number(runtime, model, name, version, maker)
    store.install(model, name, lambda draft: write_files(draft, data, f"{name}@{version}"), version)
    log.info("adapter %s@%d of %s fetched", name, version, model)


def free_number(runtime: Runtime, model: str, name: str, version: int, maker: str | None) -> None:
    """Take a version's number from files of this disk that another job made than `maker`, the one to which the registry
    gave it. They are of another registry, as that of a worker that served by itself. Raises `OSError`."""
    store = runtime.engine.store
    with store.replacing:
        if not store.has(model, name, version) or not _is_of_another(runtime, model, name, version, maker):
            return
        before = store.maker(model, name, version)
        try:
            aside = store.set_aside(model, name, version)
        except FileNotFoundError:
            # Another worker of this home was faster, and knows which folder it is.
            aside = store.folder(model, name, version).parent
        log.warning(_REPLACED, name, version, model, before, maker, aside)
        runtime.engine.forget(model, name, version)


def _is_of_another(runtime: Runtime, model: str, name: str, version: int, maker: str | None) -> bool:
    before = runtime.engine.store.maker(model, name, version)
    return maker is not None and before is not None and before != maker


def write_files(folder: Path, data: bytes, source: str) -> None:
    """The files of an adapter that travelled as one. Raises `InvalidRequest` for what is none, naming `source`."""
    for file, content in bundle.unpack(data, source).items():
        (folder / file).write_bytes(content)
