"""A store of fsspec that keeps listings as those of object stores do, and what another process does to it."""

from __future__ import annotations

from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Keeps listings by fsspec's own `dircache`: what another process writes leaves them as they are."""

    protocol = "bucket"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix(f"{cls.protocol}://")))

    def ls(self, path: str, detail: bool = True, **named: Any) -> Any:
        path = self._strip_protocol(path)
        found = self._ls_from_cache(path)
        if found is None:
            found = self.dircache[path] = super().ls(path, detail=True)
        return found if detail else sorted(each["name"] for each in found)

    def exists(self, path: str, **named: Any) -> bool:
        path = self._strip_protocol(path)
        try:
            return self._ls_from_cache(path) is not None or bool(super().exists(path))
        except FileNotFoundError:
            return False

    def invalidate_cache(self, path: str | None = None) -> None:
        if path is None:
            self.dircache.clear()
        else:
            self.dircache.pop(self._parent(path), None)

    def mv(self, one: str, other: str, **named: Any) -> None:
        super().mv(one, other, **named)
        self.invalidate_cache(other)


class Strict(MemoryFileSystem):
    """Knows no options, as that of SFTP."""

    protocol = "strict"

    def __init__(self) -> None:
        super().__init__()


def another_process_writes(path: str, data: bytes) -> None:
    Bucket(skip_instance_cache=True).pipe_file(path, data)


for each in (Bucket, Strict):
    fsspec.register_implementation(each.protocol, each, clobber=True)
