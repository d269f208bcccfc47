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
from stoker.broker.registry import Owner
from stoker.contract import bundle
from stoker.contract.base import parse_adapter
from stoker.contract.names import Rule, checked
from stoker.contract.uploads import Upload
from stoker.errors import InvalidRequest, WorkerUnavailable
from stoker.files.durable import remove_folder
from workers import clock, uploads
from workers.artifacts import Artifacts
from workers.job import Job
from workers.services.fetching import fetch, free_number, write_files
from workers.services.runtime import Fenced

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
    number = _number(given)
    fetch(job.runtime, model, name, number)
    return f"{name}@{number}"


def allocate(job: Job, model: str, name: str) -> int:
    """The number of the version that this job makes: above all that the registry or this disk has, and the same
    however often the job runs. Where the registry has lost its record, above all that the artifact store has too: under
    a number that is taken there, other workers would serve the old weights. Raises `StoreTrouble`."""
    redis, newest = job.runtime.redis, job.runtime.engine.store.newest(model, name)
    if redis.hget(keys.adapter(model, name), "next") is None:
        newest = max(newest, _artifacts(job).newest(model, name))
    given = ledger.allocate(redis, model, name, job.id, newest + 1)
    number = _number(given)
    # An owner on another disk may have chosen it.
    free_number(job.runtime, model, name, number, job.id)
    return number


def _number(given: str) -> int:
    """A version of a job's record, which another program may have written."""
    return int(checked(Rule.VERSION, "version of the job's record", given))


def publish(job: Job, model: str, name: str, version: int, known: Mapping[str, Any], *, promote: bool) -> None:
    """Put a version that is on this disk where every worker finds it, then let it serve. Raises `Fenced` for a job that
    was given to another worker: then this one leaves no version, neither there nor here."""
    redis, folder = job.runtime.redis, job.runtime.engine.store.folder(model, name, version)
    facts = {**known, "time": clock.now(redis), "worker": job.runtime.name, "job": job.id}
    owner = Owner(job.id, job.token)
    try:
        files = bundle.read_folder(folder)
    except InvalidRequest:
        if folder.is_dir():
            raise
        # A worker of the same home was overtaken by this one, and took back what it had written.
        raise WorkerUnavailable(f"{folder} is gone. The job makes it again.") from None
    kept = _artifacts(job).put(model, name, version, files, owner)
    if not kept or not registry.register(redis, model, name, version, facts, promote=promote, owner=owner):
        _take_back(job, model, name, version)
        raise Fenced(f"job {job.id} runs elsewhere.")


def _take_back(job: Job, model: str, name: str, version: int) -> None:
    """Delete the files of a version that another worker makes. It may have made them on this very disk already."""
    raw = job.runtime.redis.hgetall(keys.adapter(model, name))
    if version not in registry.parse(model, name, raw).versions:
        remove_folder(job.runtime.engine.store.folder(model, name, version))


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
        write_files(folder, data, source)
        yield folder, source


def _artifacts(job: Job) -> Artifacts:
    return Artifacts(job.runtime.settings, job.runtime.redis)
