"""STOKER_HOME, where broker, logs, adapters and runs of this machine are."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from stoker.errors import ConfigError

#: The rights of other users.
OTHERS = 0o077
#: All that Stoker keeps in its home.
PARTS = (
    *("adapters", "broker", "broker.json", "cache", "files", "flower", "identity", "logs", "prefixes", "runs"),
    *("workers", "worker.env"),
)
#: What no other program writes: a folder that has one of these is a home, with anything next to it.
MARKS = ("broker.json", "broker/password", "files/place", "flower/password", "identity", "worker.env")
#: What lies in an empty folder all the same: a disk's own, what is hidden (in an image it is a user's home too), and
#: drafts of Python's, which another process may be making just now.
_NOTHING = re.compile(r"lost\+found|\..*|tmp[a-z0-9_]{8}", re.DOTALL)
#: What to do about a folder that can be no home.
ELSEWHERE = "A home is closed to other users, with all that is in it: name a folder of its own, which may be new."


def make_home(folder: Path) -> None:
    """Make the folder, if it is not there, and close it and all that is in it to other users. Raises `ConfigError` for
    one that cannot be made or written, and for one that is not Stoker's alone, of which nothing is changed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if what := what_is_in_the_way(folder):
            raise ConfigError(f"STOKER_HOME: {folder} {what}. {ELSEWHERE}")
        # Prompts lie in the broker's append-only file, and passwords next to it.
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?")
    except OSError as error:
        raise ConfigError(
            f"STOKER_HOME: {folder} cannot be made or written ({error.strerror}). Name a folder on a disk that this "
            "user may write, and that has room."
        ) from None
    _close(folder)


def what_is_in_the_way(folder: Path) -> str | None:
    """What a folder has that a home has not, because others need it: their rights in it would be gone for good. None
    for a folder that is a home, or can become one. Raises `OSError`."""
    if folder.stat().st_mode & stat.S_ISVTX:
        return "is a folder of all users"
    strange = sorted(path.name for path in folder.iterdir() if not _is_expected(path.name))
    if not strange or any((folder / mark).is_file() for mark in MARKS):
        return None
    return f"has things in it that are not Stoker's, such as {strange[0][:80]!r}"


def _is_expected(name: str) -> bool:
    return name in PARTS or _NOTHING.fullmatch(name) is not None


def _close(folder: Path) -> None:
    """What an earlier release, or a command with another umask, left open to other users. No link is followed: what it
    leads to may be meant for them."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            # One that goes meanwhile needs no closing; another user's cannot be closed, and is behind a closed folder.
            with suppress(FileNotFoundError, PermissionError):
                mode = path.lstat().st_mode
                if mode & OTHERS and not stat.S_ISLNK(mode):
                    path.chmod(stat.S_IMODE(mode) & ~OTHERS)
