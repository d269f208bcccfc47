"""The artifact store: from where workers fetch adapters that they do not hold. The broker, or what STOKER_ARTIFACTS
names: any URL that fsspec knows, such as `s3://bucket/stoker` or a folder that workers share."""

from __future__ import annotations

import logging
import posixpath
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from stoker.broker import keys, registry
from stoker.broker.ledger import record
from stoker.broker.registry import NO_OWNER, Owner
from stoker.contract.names import Rule, checked, follows
from stoker.errors import JobFailed
from stoker.files.durable import flush, make_folders, write_whole
from stoker.files.stores import opened
from stoker.settings import Settings

log = logging.getLogger(__name__)
#: How the name of a version's file in a store ends.
SUFFIX = ".safetensors"
#: The folder of a store that is no broker in which checkpoints of runs lie: no model's name begins with a dot.
RUNS = ".runs"
#: Versions that the broker is asked for at once.
STRIDE = 256


class StoreTrouble(Exception):
    """The store did not take a version: its job can go on once the store is back."""


class Artifacts:
    def __init__(self, settings: Settings, redis: Any) -> None:
        self._url, self._redis = settings.artifacts, redis

    def check(self) -> None:
        """Raises `ConfigError` for a URL that this installation cannot use: better at the start than after a run."""
        if self._url is not None:
            self.root()

    def put(self, model: str, name: str, version: int, data: bytes, owner: Owner = NO_OWNER) -> bool:
        """Keep a version; one that is there already is the same. False for an owner that was fenced. Raises
        `StoreTrouble`."""
        if self._url is None:
            return registry.keep(self._redis, model, name, version, data, owner)
        if owner is not NO_OWNER and record.owner(owner.job_id).on(self._redis) != owner.token:
            return False
        with self.reported_as(StoreTrouble):
            fs, path = self._location(model, name, version)
            _put(fs, path, data)
        return True

    def get(self, model: str, name: str, version: int) -> bytes | None:
        """A version's bytes, None where it is not kept. Raises `JobFailed` for a store that does not answer."""
        if self._url is None:
            found: bytes | None = self._redis.get(keys.artifact(model, name, version))
            return found
        with self.reported_as(JobFailed):
            fs, path = self._location(model, name, version)
            return bytes(fs.cat_file(path)) if fs.exists(path) else None

    def newest(self, model: str, name: str) -> int:
        """The highest version that is kept; 0 if there is none. In the broker, where a worker may not look for keys,
        versions that lie more than `STRIDE` above the one before are not seen. Raises `StoreTrouble`."""
        if self._url is None:
            return self._newest_in_broker(model, name)
        with self.reported_as(StoreTrouble):
            fs, path = self._location(model, name, 1)
            folder = posixpath.dirname(path)
            names = [posixpath.basename(file) for file in fs.ls(folder, detail=False)] if fs.exists(folder) else []
        numbers = [file.removesuffix(SUFFIX) for file in names if file.endswith(SUFFIX)]
        return max((int(number) for number in numbers if follows(Rule.VERSION, number)), default=0)

    def _newest_in_broker(self, model: str, name: str) -> int:
        newest = 0
        while True:
            asked = range(newest + 1, newest + 1 + STRIDE)
            pipeline = self._redis.pipeline(transaction=False)
            for version in asked:
                pipeline.exists(keys.artifact(model, name, version))
            found = [version for version, there in zip(asked, pipeline.execute(), strict=True) if there]
            if not found:
                return newest
            newest = found[-1]

    def folder(self, name: str) -> StoreFolder | None:
        """A folder in the store that STOKER_ARTIFACTS names, next to those of the models; None where it names none."""
        return None if self._url is None else StoreFolder(self, name)

    @contextmanager
    def reported_as(self, kind: type[Exception]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each of fsspec's packages has errors of its own
            what = f"{type(error).__name__}: {error}"
            raise kind(f"the artifact store {self._url} (STOKER_ARTIFACTS) cannot be used: {what}") from error

    def _location(self, model: str, name: str, version: int) -> tuple[Any, str]:
        fs, root = self.root()
        folder = f"{checked(Rule.NAME, 'model', model)}/{checked(Rule.NAME, 'adapter', name)}"
        return fs, f"{root.rstrip('/')}/{folder}/{checked(Rule.VERSION, 'version', str(version))}{SUFFIX}"

    def root(self) -> tuple[Any, str]:
        """The file system of the store, and the path in it. Raises `ConfigError`."""
        return opened(str(self._url))


class StoreFolder:
    """Files in a folder of the store, each whole or not there. Every call except `remove` and `clear`, which try their
    best, raises `StoreTrouble`."""

    def __init__(self, store: Artifacts, name: str) -> None:
        self._store, self._name = store, name

    def put(self, name: str, data: bytes) -> None:
        with self._opened() as (fs, home):
            _put(fs, f"{home}/{name}", data)

    def get(self, name: str) -> bytes | None:
        with self._opened() as (fs, home):
            return bytes(fs.cat_file(f"{home}/{name}")) if fs.exists(f"{home}/{name}") else None

    def names(self) -> list[str]:
        with self._opened() as (fs, home):
            found = fs.ls(home, detail=False) if fs.exists(home) else []
            return [posixpath.basename(path) for path in found]

    def changed(self) -> float:
        """When its newest file was written, in seconds since the epoch; 0 for a folder without any."""
        with self._opened() as (fs, home):
            found = fs.ls(home, detail=False) if fs.exists(home) else []
            return max((fs.modified(path).timestamp() for path in found), default=0.0)

    def remove(self, names: Iterable[str]) -> None:
        def remove(name: str, fs: Any, home: str) -> None:
            fs.rm_file(f"{home}/{name}")

        for name in names:
            self._try(partial(remove, name))

    def clear(self) -> None:
        """Delete the folder with all that is in it."""
        self._try(lambda fs, home: fs.exists(home) and fs.rm(home, recursive=True))

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        with self._store.reported_as(StoreTrouble):
            fs, root = self._store.root()
            yield fs, f"{root.rstrip('/')}/{self._name}"

    def _try(self, act: Callable[[Any, str], object]) -> None:
        try:
            with self._opened() as (fs, home):
                act(fs, home)
        except StoreTrouble as error:
            log.info("what is not needed any more in %s could not be deleted: %s", self._name, error)


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def _put(fs: Any, path: str, data: bytes) -> None:
    if _is_local(fs):
        _put_local(Path(path), data)
    else:
        _put_remote(fs, path, data)


def _put_local(path: Path, data: bytes) -> None:
    """A folder that workers share: on disk before the registry says that the version is there."""
    make_folders(path.parent)
    if path.exists():
        # The worker that renamed the file may have died before the rename was on disk.
        flush(path.parent)
    else:
        write_whole(path, lambda draft: draft.write_bytes(data))


def _put_remote(fs: Any, path: str, data: bytes) -> None:
    """Under another name first, and of this writer alone: nobody reads half a file."""
    if not fs.exists(path):
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        draft = f"{path}.{secrets.token_hex(4)}"
        try:
            with fs.open(draft, "wb") as file:
                file.write(data)
            fs.mv(draft, path)
        except Exception:
            # Another writer of the same version may have been faster, and swept this draft.
            if not fs.exists(path):
                _sweep(fs, path)
                raise
    _sweep(fs, path)


def _sweep(fs: Any, path: str) -> None:
    """Delete drafts of a version, also of writers that died. Best effort: what is kept does not depend on it."""
    try:
        for left in fs.ls(posixpath.dirname(path), detail=False):
            if posixpath.basename(left).startswith(f"{posixpath.basename(path)}."):
                fs.rm_file(left)
    except Exception as error:  # as above
        log.info("drafts of %s could not be deleted: %s", path, error)
