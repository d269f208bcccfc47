"""What lies under STOKER_HOME: how much of it there is, and what may go."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stoker.files.durable import DRAFT, remove_folder, sweep
from stoker.local.runs import stored_runs
from stoker.settings import Settings


@dataclass(frozen=True)
class Used:
    """The disk that one part of STOKER_HOME takes. `bytes`: of the blocks that its files fill."""

    name: str
    path: Path
    files: int
    bytes: int


@dataclass(frozen=True)
class Leftover:
    """Something that nothing needs any more, and why."""

    path: Path
    reason: str
    bytes: int


def disk_use(settings: Settings) -> list[Used]:
    """The disk that each part takes, the largest first. A file that goes meanwhile counts as gone."""
    home = settings.home
    parts = [path for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    loose = [path for path in home.iterdir() if path.is_file()] if home.is_dir() else []
    found = [_used(path.name, path, list(_files(path))) for path in parts if not path.is_symlink()]
    found.append(_used("other files", home, [size for path in loose for size in _sizes(path)]))
    return sorted(found, key=lambda used: -used.bytes)


def leftovers(settings: Settings, before: float) -> list[Leftover]:
    """Runs that ended, and logs that were last written, before that moment, in seconds since the epoch. A run that
    has not ended stays: a worker may go on with it."""
    found = [
        Leftover(run.folder, f"a run of {run.asked['name']} that ended ({run.status})", _bytes(run.folder))
        for run in stored_runs(settings.runs)
        if run.has_ended and run.changed < before
    ]
    logs = settings.logs
    for path in sorted(logs.iterdir()) if logs.is_dir() else []:
        if path.is_file() and not path.is_symlink() and path.stat().st_mtime < before:
            found.append(Leftover(path, "a log that nothing writes", _bytes(path)))
    return found


def drafts(settings: Settings) -> list[Path]:
    """Files and folders that were being written when their writer died, or that are being written now."""
    return list(settings.home.rglob(f"{DRAFT}*")) if settings.home.is_dir() else []


def remove(leftover: Leftover) -> None:
    """Raises `OSError`."""
    if leftover.path.is_dir():
        remove_folder(leftover.path)
    else:
        leftover.path.unlink(missing_ok=True)


def remove_drafts(settings: Settings) -> int:
    """Delete the drafts whose writers died; return how many. One that a living process writes is locked, and stays."""
    found = drafts(settings)
    for folder in {path.parent for path in found}:
        with suppress(FileNotFoundError):
            sweep(folder)
    return sum(not path.exists() for path in found)


def _used(name: str, path: Path, sizes: list[int]) -> Used:
    return Used(name, path, len(sizes), sum(sizes))


def _bytes(path: Path) -> int:
    return sum(_files(path)) if path.is_dir() else sum(_sizes(path))


def _files(folder: Path) -> Iterator[int]:
    for root, _, names in os.walk(folder):
        for name in names:
            yield from _sizes(Path(root, name))


def _sizes(path: Path) -> Iterator[int]:
    with suppress(FileNotFoundError):
        known = path.lstat()
        if stat.S_ISREG(known.st_mode):
            # What a file says of its length is not what it takes: the append-only file is written ahead.
            yield known.st_blocks * 512
