"""What stored files hold, in parts: in a folder of this machine, or in the store that STOKER_ARTIFACTS names.

A part is written once, under a name that no other writer takes, and is there whole or not at all: so a file can grow
part by part, also in a store that cannot append, and nobody ever holds the whole of it in memory.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from stoker.files.durable import draft_folder, make_folders, publish, write_whole
from stoker.files.stores import opened
from stoker.settings import Settings

#: Bytes that a part has, except the last one of a writer.
PART = 4 * 2**20
#: The folder of files, in STOKER_HOME or in the store: no model's name begins with a dot.
LOCAL, REMOTE = "files", ".files"


class Contents(Protocol):
    """`place`: which store it is; gateways with the same one see the same parts. Every call raises `OSError`."""

    place: str

    def put(self, file_id: str, part: str, data: bytes) -> None: ...

    def get(self, file_id: str, part: str) -> bytes:
        """Raises `FileNotFoundError` for a part that is not there."""

    def remove(self, file_id: str) -> None:
        """Delete all parts of a file; nothing, where there are none."""


def contents_of(settings: Settings) -> Contents:
    """Raises `ConfigError` for a store that cannot be used, and `OSError`."""
    return FolderContents(settings.home / LOCAL) if settings.artifacts is None else StoreContents(settings.artifacts)


def there_are(settings: Settings) -> bool:
    """Whether a file may have been stored in this place."""
    return settings.artifacts is not None or (settings.home / LOCAL).is_dir()


class FolderContents:
    """In a folder that the gateways of a machine share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not folder.is_dir():
            # The first to make it says what it is called.
            with draft_folder(folder.parent) as draft:
                (draft / "place").write_text(uuid4().hex[:16], "utf-8")
                publish(draft, folder)
        self.place = (folder / "place").read_text("utf-8")

    def put(self, file_id: str, part: str, data: bytes) -> None:
        make_folders(self._folder / file_id)
        write_whole(self._folder / file_id / part, lambda draft: draft.write_bytes(data), mode=0o600)

    def get(self, file_id: str, part: str) -> bytes:
        return (self._folder / file_id / part).read_bytes()

    def remove(self, file_id: str) -> None:
        # Of what cannot be deleted, the caller learns: it tries again. What another gateway deleted first is gone.
        while (self._folder / file_id).exists():
            with suppress(FileNotFoundError):
                shutil.rmtree(self._folder / file_id)


class StoreContents:
    """In any store that fsspec knows. Nobody asks for a part before it is whole: its name is known from then on."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.place = hashlib.sha256(url.encode()).hexdigest()[:16]
        self._fs, root = opened(url)
        self._root = f"{root.rstrip('/')}/{REMOTE}"

    def put(self, file_id: str, part: str, data: bytes) -> None:
        with self._asked() as fs:
            fs.makedirs(f"{self._root}/{file_id}", exist_ok=True)
            fs.pipe_file(f"{self._root}/{file_id}/{part}", data)

    def get(self, file_id: str, part: str) -> bytes:
        with self._asked() as fs:
            return bytes(fs.cat_file(f"{self._root}/{file_id}/{part}"))

    def remove(self, file_id: str) -> None:
        folder = f"{self._root}/{file_id}"
        with self._asked() as fs:
            if fs.exists(folder):
                fs.rm(folder, recursive=True)

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        """Each of fsspec's packages has errors of its own."""
        try:
            yield self._fs
        except OSError:
            raise
        except Exception as error:
            raise OSError(None, f"{type(error).__name__}: {error}") from error
