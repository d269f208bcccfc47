"""What this machine keeps for one user alone, in folders where other users may write too."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def temporary_folder() -> Path:
    """This user's, within the folder for temporary files. It may be absent, or another user's: see `trusted`."""
    return Path(tempfile.gettempdir()) / f"stoker-{os.getuid()}"


def trusted(path: Path) -> bool:
    """Whether `path` is a file or a folder of this user's (or root's) that nobody else may write."""
    try:
        state = path.stat()
    except OSError:
        return False
    return state.st_uid in (0, os.getuid()) and not state.st_mode & 0o022
