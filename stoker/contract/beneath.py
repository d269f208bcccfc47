"""Files under a root: no name and no link leads out of it, also while names and links change.

A path that is looked at first and opened then may be another one by then. So each part is opened by itself, from the
folder before it and without following links; a link is read, and its target taken for further parts.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Literal

#: As many links as systems follow.
_MOST_LINKS = 40
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Without O_NONBLOCK, opening a pipe waits for its writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class OutsideError(OSError):
    """The path leads out of its root."""


@dataclass(frozen=True)
class Beneath:
    """The file `path` under `root`, which is trusted: it may itself be reached by links."""

    root: Path
    path: str

    @property
    def name(self) -> str:
        return PurePath(self.path).name

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The file, open. Raises `OutsideError`, another `OSError`, also for what is no file, and `ValueError` for a
        name that none can have."""
        with ExitStack() as stack:
            handle = _walked(self.root, self.path, stack)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return os.fdopen(handle, mode)
        os.close(handle)
        raise OSError(errno.EINVAL, "neither a file nor a link to one", self.path)


def _walked(root: Path, path: str, stack: ExitStack) -> int:
    """A handle of the file; those of the folders are closed with `stack`."""

    def opened(part: str | Path, flags: int, at: int | None) -> int:
        handle = os.open(part, flags, dir_fd=at)
        if flags == _FOLDER or at is None:
            stack.callback(os.close, handle)
        return handle

    folders = [opened(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, None)]
    parts, links = _parts(path), 0
    while parts:
        part = parts.pop()
        if part == "..":
            if len(folders) == 1:
                raise OutsideError(errno.EXDEV, "leads out of its root", path)
            folders.pop()
            continue
        try:
            handle = opened(part, _FOLDER if parts else _FILE, folders[-1])
        except OSError as error:
            target = _target(part, folders[-1], error)
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
            if os.path.isabs(target):
                target, folders = _within(root, target, path), folders[:1]
            parts += _parts(target)
            continue
        if not parts:
            return handle
        folders.append(handle)
    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _parts(path: str) -> list[str]:
    """The last one first."""
    if os.path.isabs(path):
        raise OutsideError(errno.EXDEV, "leads out of its root", path)
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _target(part: str, folder: int, error: OSError) -> str:
    """Where a link leads. Raises `error` for what is none."""
    try:
        return os.readlink(part, dir_fd=folder)
    except OSError:
        raise error from None


def _within(root: Path, target: str, path: str) -> str:
    """An absolute target by its way from the root."""
    for known in (root, root.resolve()):
        if PurePath(target).is_relative_to(known):
            return str(PurePath(target).relative_to(known))
    raise OutsideError(errno.EXDEV, "leads out of its root", path)
