"""What lies under STOKER_HOME: how much of it there is, and what may go."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stoker.files.durable import DRAFT, remove_folder, sweep
from stoker.files.locks import try_lock
from stoker.settings import Settings


@dataclass(frozen=True)
class Used:
    """The disk that one part of STOKER_HOME takes. `bytes`: of the blocks that its files fill. `limit`: how much of it
    is kept, and which settings say so; "" where nothing limits it."""

    name: str
    path: Path
    files: int
    bytes: int
    limit: str = ""


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
    limits = _limits(settings)
    found = [
        _used(path.name, path, list(_files(path)), limits.get(path.name, "")) for path in parts if not path.is_symlink()
    ]
    found.append(_used("other files", home, [size for path in loose for size in _sizes(path)]))
    return sorted(found, key=lambda used: -used.bytes)


def _limits(settings: Settings) -> dict[str, str]:
    """What is kept of each part, by its name."""
    of_logs = f"{settings.log_files + 1} files of {settings.log_size} MB a process"
    of_runs = f"{settings.keep_runs} ended runs, {settings.keep_days} days, {settings.keep_megabytes} MB"
    return {
        "runs": f"{of_runs} (STOKER_KEEP_RUNS, STOKER_KEEP_DAYS, STOKER_KEEP_MEGABYTES)",
        "logs": f"{of_logs} (STOKER_LOG_FILES, STOKER_LOG_SIZE)",
        "prefixes": f"{settings.prefix_disk} MB (STOKER_PREFIX_DISK)",
        "files": "30 days, or as long as its client said, up to 16 GB a client",
        "broker": "results for result_seconds, vectors up to vector_bytes (`stoker jobs policy`)",
    }


def old_logs(settings: Settings, before: float) -> list[Leftover]:
    """Logs that were last written before that moment, in seconds since the epoch, and whose writers have ended."""
    paths = sorted(settings.logs.iterdir()) if settings.logs.is_dir() else []
    return [found for path in paths if (found := _old_log(path, before)) is not None]


def _old_log(path: Path, before: float) -> Leftover | None:
    # A worker that turns its logs over, or another clean, may delete it meanwhile.
    with suppress(FileNotFoundError):
        if path.is_file() and not path.is_symlink() and path.stat().st_mtime < before:
            size = bytes_of(path)
            with _unwritten(path) as free:
                return Leftover(path, "a log that nothing writes", size) if free else None
    return None


@contextmanager
def _unwritten(log: Path) -> Iterator[bool]:
    """Whether no guard that lives writes a log, nor begins to meanwhile. Raises `FileNotFoundError`."""
    with ExitStack() as opened:
        try:
            free = try_lock(opened.enter_context(log.open("r+b")))
        except FileNotFoundError:
            raise
        except OSError:
            # Of a disk without locks, or another user's: nobody can say.
            free = False
        yield free


def drafts(settings: Settings) -> list[Path]:
    """Files and folders that were being written when their writer died, or that are being written now."""
    return [path for path in below(settings.home) if path.name.startswith(DRAFT)]


def below(folder: Path) -> Iterator[Path]:
    """Every file and folder that lies below one, without following links. What goes meanwhile, as drafts do, is left
    out: `Path.rglob` would end there."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *names))


def remove(leftover: Leftover) -> None:
    """Raises `OSError`."""
    if leftover.path.is_dir():
        remove_folder(leftover.path)
    else:
        with suppress(FileNotFoundError), _unwritten(leftover.path) as free:
            # A process may have begun to write it since it was found.
            if free:
                leftover.path.unlink()


def remove_drafts(settings: Settings) -> int:
    """Delete the drafts whose writers died; return how many. One that a living process writes is locked, and stays."""
    found = drafts(settings)
    for folder in {path.parent for path in found}:
        with suppress(FileNotFoundError):
            sweep(folder)
    return sum(not path.exists() for path in found)


def _used(name: str, path: Path, sizes: list[int], limit: str = "") -> Used:
    return Used(name, path, len(sizes), sum(sizes), limit)


def bytes_of(path: Path) -> int:
    """The disk that a file takes, or a folder with all that is in it."""
    return sum(_files(path)) if path.is_dir() else sum(_sizes(path))


def _files(folder: Path) -> Iterator[int]:
    for path in below(folder):
        yield from _sizes(path)


def _sizes(path: Path) -> Iterator[int]:
    with suppress(FileNotFoundError):
        known = path.lstat()
        if stat.S_ISREG(known.st_mode):
            # What a file says of its length is not what it takes: the append-only file is written ahead.
            yield known.st_blocks * 512
