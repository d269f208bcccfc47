"""STOKER_HOME, where broker, logs, adapters and runs of this machine are."""

from __future__ import annotations

import tempfile
from pathlib import Path

from stoker.errors import ConfigError


def make_home(folder: Path) -> None:
    """Make the folder, if it is not there, and close it to other users. Raises `ConfigError` for one that cannot be
    made or written."""
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
