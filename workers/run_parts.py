"""Where the parts of a run's checkpoints lie: in the broker, or in the store that STOKER_ARTIFACTS names."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Protocol

from stoker.broker import keys
from workers.artifacts import StoreFolder
from workers.job_lease import JobLease
from workers.run_manifest import content_of


class NoRoom(Exception):
    """The store does not take a checkpoint. The run goes on; the words say what would help."""


class Parts(Protocol):
    #: Bytes of a part, except of a file's last.
    size: int

    def there(self, committed: Iterable[str]) -> dict[str, str]:
        """Content → name of each part that need not be sent. `committed`: those of the manifest."""
        ...

    def put(self, content: str, data: bytes) -> str:
        """Keep a part; its name. Raises `Fenced`, `NoRoom` or `StoreTrouble`."""
        ...

    def get(self, name: str) -> bytes | None: ...

    def in_broker(self, names: Iterable[str]) -> list[str]:
        """Those that the broker has to hold for a manifest to be whole."""
        ...

    def committed(self, before: Iterable[str], now: Iterable[str]) -> None:
        """The manifest needs `now`, where it needed `before`."""
        ...

    def fenced(self) -> None:
        """The run is another worker's: take back what no manifest needs."""
        ...

    def clear(self) -> None:
        """The run has ended."""
        ...


class BrokerParts:
    """In the hash in which the manifest lies: what is fenced writes nothing, and each manifest sweeps."""

    size = 2**20

    def __init__(self, lease: JobLease) -> None:
        self._lease, self._redis, self._key = lease, lease.runtime.redis, keys.checkpoint(lease.job_id)

    def there(self, committed: Iterable[str]) -> dict[str, str]:
        # Also those of an upload that was cut: they are named by what they hold.
        names = [name.decode(errors="replace") for name in self._redis.hkeys(self._key)]
        return {name: name for name in names if name not in ("manifest", "bytes")}

    def put(self, content: str, data: bytes) -> str:
        kept = self._lease.keep_part(content, data)
        if not kept.there:
            raise NoRoom(
                f"the broker has {kept.bytes} bytes of jobs of {self._lease.queue} and takes checkpoints up to "
                f"{kept.limit}, half of queue_bytes (`stoker jobs policy queue_bytes`)"
            )
        return content

    def get(self, name: str) -> bytes | None:
        found: bytes | None = self._redis.hget(self._key, name)
        return found

    def in_broker(self, names: Iterable[str]) -> list[str]:
        return list(names)

    def committed(self, before: Iterable[str], now: Iterable[str]) -> None: ...

    def fenced(self) -> None: ...

    def clear(self) -> None: ...


class FolderParts:
    """In a folder of the run. A part's name says which owner wrote it: so an owner that was overtaken, which may write
    one more, can delete its own without touching those of the next."""

    size = 16 * 2**20

    def __init__(self, folder: StoreFolder, token: str) -> None:
        self._folder, self._mark = folder, sha256(token.encode()).hexdigest()[:8]
        #: Written, and in no manifest yet; and all that may be there without one, because a write failed half-way.
        self._loose: dict[str, str] = {}
        self._stray: set[str] = set()
        self._looked = False

    def there(self, committed: Iterable[str]) -> dict[str, str]:
        if not self._looked:
            # What owners that died have left. Not looked for later: then there may be parts of the next owner too.
            self._stray, self._looked = set(self._folder.names()) - set(committed), True
        return {**{content_of(name): name for name in committed}, **self._loose}

    def put(self, content: str, data: bytes) -> str:
        name = f"{content}-{self._mark}"
        self._stray.add(name)
        self._folder.put(name, data)
        self._loose[content] = name
        return name

    def get(self, name: str) -> bytes | None:
        return self._folder.get(name)

    def in_broker(self, names: Iterable[str]) -> list[str]:
        return []

    def committed(self, before: Iterable[str], now: Iterable[str]) -> None:
        self._folder.remove({*before, *self._stray} - set(now))
        self._stray.clear()
        self._loose.clear()

    def fenced(self) -> None:
        self._folder.remove(name for name in self._stray if name.endswith(f"-{self._mark}"))
        self._stray.clear()
        self._loose.clear()

    def clear(self) -> None:
        self._folder.clear()
