"""A password of this machine's own, or a name that no other has, in a file that no other user can read."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from pathlib import Path

from stoker.errors import ConfigError


def private_folder(folder: Path) -> Path:
    """Make a folder, or close one that is there, to other users. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"STOKER_HOME: {folder} cannot be made, or closed to others ({error.strerror}).") from None
    return folder


def opener(path: str, flags: int) -> int:
    """For `open`: a file that it makes is for this user alone."""
    return os.open(path, flags, 0o600)


def kept_password(file: Path) -> str:
    """The password in `file`, made when it is first asked for. Raises `ConfigError`."""
    try:
        if not file.exists():
            _make(file)
        file.chmod(0o600)
        found = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the password cannot be read ({error}).") from None
    if not re.fullmatch(r"[A-Za-z0-9_.~-]{8,256}", found):
        raise ConfigError(
            f"{file}: it holds no password; allowed: 8 to 256 letters, digits and _ . ~ -. Delete it: another is made."
        )
    return found


def _make(file: Path) -> None:
    """Whole or not at all; of two processes that start together, one makes it."""
    handle, draft = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(secrets.token_urlsafe(18) + "\n")
            out.flush()
            os.fsync(out.fileno())
        _publish(draft, file)
    finally:
        Path(draft).unlink(missing_ok=True)


def _publish(draft: str, file: Path) -> None:
    try:
        os.link(draft, file)
    except FileExistsError:
        pass
    except OSError:
        # A file system without links, as exFAT.
        os.rename(draft, file)
