"""STOKER_HOME, where broker, logs, adapters and runs of this machine are."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from stoker.errors import ConfigError

#: The rights of other users.
OTHERS = 0o077


def make_home(folder: Path) -> None:
    """Make the folder, if it is not there, and close it and all that is in it to other users. Raises `ConfigError` for
    one that cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
