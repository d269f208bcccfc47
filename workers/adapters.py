"""Adapters between the registry in the broker, the artifact store, and this worker's disk and memory."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stoker.broker import keys, ledger, registry
from stoker.broker.ledger import record
from stoker.contract import bundle
from stoker.contract.base import parse_adapter
from stoker.contract.names import Rule, checked
from stoker.contract.uploads import Upload
from stoker.errors import UnknownAdapter
from workers import clock, uploads
from workers.artifacts import Artifacts
from workers.job import Job

log = logging.getLogger(__name__)


def pinned(job: Job, model: str, adapter: str) -> str:
    """`adapter` with the version that this job uses from its first owner to its last, its files on this disk.

    An adapter that the registry does not know may lie on this disk all the same; then the engine chooses.
    """
    name, version = parse_adapter(adapter)
    redis = job.runtime.redis
    given = record.version(job.id).on(redis)
    if given is None:
        raw = redis.hgetall(keys.adapter(model, name))
        if not raw:
            return adapter
        given = ledger.pin(redis, job.id, registry.parse(model, name, raw).version(version))
    number = int(checked(Rule.VERSION, "version of the job's record", given))
    _fetch(job, model, name, number)
    return f"{name}@{number}"


def allocate(job: Job, model: str, name: str) -> int:
    """The number of the version that this job makes: above all that the registry or this disk has, and the same
    however often the job runs. Where the registry has lost its record, above all that the artifact store has too: under
    a number that is taken there, other workers would serve the old weights. Raises `StoreTrouble`."""
    redis, newest = job.runtime.redis, job.runtime.engine.store.newest(model, name)
    if redis.hget(keys.adapter(model, name), "next") is None:
        newest = max(newest, _artifacts(job).newest(model, name))
    given = ledger.allocate(redis, model, name, job.id, newest + 1)
    return int(checked(Rule.VERSION, "version of the job's record", given))


def publish(job: Job, model: str, name: str, version: int, known: Mapping[str, Any], *, promote: bool) -> None:
    """Put a version that is on this disk where every worker finds it, then let it serve."""
    folder = job.runtime.engine.store.folder(model, name, version)
    _artifacts(job).put(model, name, version, bundle.read_folder(folder))
    facts = {**known, "time": clock.now(job.runtime.redis), "worker": job.runtime.name, "job": job.id}
    registry.register(job.runtime.redis, model, name, version, facts, promote=promote)


@contextmanager
def unpacked(job: Job, upload: str) -> Iterator[tuple[Path, str] | None]:
    """A folder with the files of an upload, and where its client had them; None if it has expired."""
    data = uploads.read(job.runtime.redis, Upload.parse(upload, "adapter", job.id))
    with tempfile.TemporaryDirectory(prefix="stoker-adapter-") as home:
        folder = Path(home)
        if data is None:
            yield None
            return
        source = bundle.source(data, upload)
        _write(folder, data, source)
        yield folder, source


def _fetch(job: Job, model: str, name: str, version: int) -> None:
    store = job.runtime.engine.store
    if store.has(model, name, version):
        return
    data = _artifacts(job).get(model, name, version)
    if data is None:
        raise UnknownAdapter(
            f"adapter '{name}@{version}' given; it is registered, but no store that this worker reaches has its files."
        )
    store.install(model, name, lambda draft: _write(draft, data, f"{name}@{version}"), version)
    log.info("adapter %s@%d of %s fetched", name, version, model)


def _artifacts(job: Job) -> Artifacts:
    return Artifacts(job.runtime.settings, job.runtime.redis)


def _write(folder: Path, data: bytes, source: str) -> None:
    for file, content in bundle.unpack(data, source).items():
        (folder / file).write_bytes(content)
