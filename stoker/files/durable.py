"""Files and folders that are written whole or not at all, and are on disk once it is said so.

A writer fills a draft next to the target, flushes it, renames it, and flushes the folder that it lies in. A reader, or
a crash or a power cut at any moment, sees the old content or the new, never a part. A draft is locked while its writer
lives, so that the next writer knows the drafts of those that died, and deletes them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stoker.files.locks import try_lock

#: How the names of all drafts begin.
DRAFT = ".stoker-draft-"


def write_whole(path: Path, write: Callable[[Path], object], *, mode: int = 0o644) -> None:
    """Have `write` fill a draft next to `path`, then rename it to `path`. Raises `OSError`.

    In a draft folder there is nothing to protect: `publish` flushes it as one.
    """
    if path.parent.name.startswith(DRAFT):
        write(path)
        return
    sweep(path.parent)
    # The suffix is kept because MLX picks a file's format by it.
    prefix = f"{DRAFT}{path.stem}-"
    with _held(lambda: tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)) as draft:
        try:
            write(draft)
            flush(draft)
            os.chmod(draft, mode)
            os.replace(draft, path)
        except OSError as error:
            if error.filename is None:
                error.filename = str(path)
            raise
        finally:
            draft.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def draft_folder(home: Path) -> Iterator[Path]:
    """A new folder in `home`, to be filled and given to `publish`; deleted if it was not. Raises `OSError`."""
    make_folders(home)
    sweep(home)
    with _held(lambda: _folder_in(home)) as draft:
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, target: Path) -> bool:
    """Give a draft folder its name, `target` in the same folder; False if that is there already, and stays as it is.

    In both cases `target` is on disk then. Raises `OSError`.
    """
    for path in draft.rglob("*"):
        flush(path)
    draft.chmod(0o755)
    flush(draft)
    try:
        # A folder cannot be renamed onto one that holds files: two writers never share a name.
        os.rename(draft, target)
        new = True
    except OSError:
        if not os.path.lexists(target):
            raise
        new = False
    # Also for one that is there: the writer that renamed it may have died before this.
    flush(target.parent)
    return new


def remove_folder(path: Path) -> None:
    """Delete a folder out of sight: no half of it is ever found under its name."""
    # Another process may have been faster.
    with draft_folder(path.parent) as grave, suppress(FileNotFoundError):
        os.rename(path, grave / path.name)
        flush(grave)
        flush(path.parent)


def make_folders(folder: Path, *, mode: int = 0o777) -> None:
    """Make a folder and those above it, on disk; `mode`: of those that are new. Raises `OSError`."""
    if folder.is_dir():
        return
    make_folders(folder.parent, mode=mode)
    folder.mkdir(mode, exist_ok=True)
    flush(folder.parent)


def sweep(folder: Path) -> None:
    """Delete the drafts in `folder` whose writers died."""
    for draft in [path for path in folder.iterdir() if path.name.startswith(DRAFT)]:
        # The draft may be gone, or belong to another user.
        with suppress(OSError):
            handle = os.open(draft, os.O_RDONLY if draft.is_dir() else os.O_RDWR)
            try:
                if try_lock(handle):
                    shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            finally:
                os.close(handle)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries (a rename), to disk. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            # There, fsync leaves it in the drive's memory. Some file systems know fsync alone.
            with suppress(OSError):
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
                return
        os.fsync(handle)
    finally:
        os.close(handle)


def _folder_in(home: Path) -> tuple[int, str]:
    while True:
        name = tempfile.mkdtemp(prefix=DRAFT, dir=home)
        # As in `_mine`, a moment earlier.
        with suppress(FileNotFoundError):
            return os.open(name, os.O_RDONLY), name


@contextmanager
def _held(make: Callable[[], tuple[int, str]]) -> Iterator[Path]:
    """A new draft, under a lock that says that its writer lives."""
    while True:
        handle, name = make()
        try:
            if _mine(handle, name):
                yield Path(name)
                return
        finally:
            os.close(handle)


def _mine(handle: int, name: str) -> bool:
    """False for a draft that, in the moment before its lock, looked like a dead writer's and was swept."""
    try:
        return try_lock(handle) and os.path.exists(name)
    except OSError:
        # A file system without locks: nobody can sweep there either.
        return True
