"""A backup: adapters, runs, and what the broker keeps for good, in one file.

The file is a gzipped tar archive: `backup.json` says what it is, `broker.jsonl` has the broker's durable keys that
people made (the registry of adapters, their files, the policy), `adapters/` and `runs/` are the folders of STOKER_HOME.
Jobs that wait, results and streams are not in it: they live for days, and their clients send them again.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import stoker
from stoker.broker import keys
from stoker.errors import InvalidRequest
from stoker.files.durable import DRAFT, make_folders, write_whole
from stoker.settings import Settings

#: The version of the archive's layout.
FORMAT = 1
#: The folders of STOKER_HOME that are kept.
FOLDERS = ("adapters", "runs")
#: The kinds of keys that are kept (`stoker.broker.keys.KINDS`).
KINDS = ("adapters", "adapter", "artifact", "policy")
_ABOUT, _KEYS = "backup.json", "broker.jsonl"


@dataclass(frozen=True)
class Counted:
    """What went into a backup or came out of it. `kept`: names that were there already, and stay as they are."""

    files: int
    keys: int
    kept: tuple[str, ...] = ()


def backup(settings: Settings, redis: Any, target: Path) -> Counted:
    """Write everything to `target`, whole or not at all. Raises `OSError`, and redis-py's errors."""
    counted = Counted(0, 0)

    def write(draft: Path) -> None:
        nonlocal counted
        # The fastest level: the weights of adapters hardly shrink.
        with tarfile.open(draft, "w:gz", compresslevel=1) as archive:
            about = {"format": FORMAT, "stoker": stoker.__version__, "made": time.time()}
            _add_bytes(archive, _ABOUT, json.dumps(about).encode())
            counted = Counted(
                sum(_add_folder(archive, settings.home / name) for name in FOLDERS), _add_keys(archive, redis)
            )

    write_whole(target, write)
    return counted


def restore(settings: Settings, redis: Any, source: Path) -> Counted:
    """Put back what is missing. What is there already stays: a restore never overwrites, and may be run again.

    Raises `InvalidRequest` for a file that is no backup, `OSError`, and redis-py's errors.
    """
    files, added, kept = 0, 0, []
    try:
        with tarfile.open(source, "r:gz") as archive:
            # All names first, so that nothing of a file that is no backup is restored.
            for member in _checked(archive, source):
                if member.name == _KEYS:
                    added, found = _restore_keys(_opened(archive, member), redis)
                    kept += found
                elif _restore_file(archive, member, settings.home):
                    files += 1
                else:
                    kept.append(member.name)
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{source}: no whole backup of `stoker backup` ({error}).") from None
    return Counted(files, added, tuple(kept))


def _add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(data))


def _add_folder(archive: tarfile.TarFile, folder: Path) -> int:
    """Regular files alone. One that goes or grows while it is read is in the archive as it was when it was opened."""
    files = 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = path.relative_to(folder.parent).as_posix()
        if path.is_symlink() or not path.is_file() or DRAFT in name:
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        _add_bytes(archive, name, data)
        files += 1
    return files


def _add_keys(archive: tarfile.TarFile, redis: Any) -> int:
    count = 0
    with tempfile.TemporaryFile() as spool:
        for line in _exported(redis):
            spool.write(json.dumps(line).encode() + b"\n")
            count += 1
        entry = tarfile.TarInfo(_KEYS)
        entry.size, entry.mode, entry.mtime = spool.tell(), 0o600, int(time.time())
        spool.seek(0)
        archive.addfile(entry, spool)
    return count


def _exported(redis: Any) -> Iterator[dict[str, Any]]:
    for key in sorted(redis.scan_iter(f"{keys.PREFIX}*", count=1000)):
        name = key.decode(errors="replace")
        kind = keys.kind_of(name)
        if kind is None or kind.name not in KINDS:
            continue
        held = redis.type(key).decode()
        if held == "hash":
            value: Any = [[_text(field), _text(content)] for field, content in redis.hgetall(key).items()]
        elif held == "set":
            value = [_text(member) for member in sorted(redis.smembers(key))]
        elif held == "string":
            value = _text(redis.get(key))
        else:
            # Another program's value: Stoker writes no other type under these names.
            continue
        yield {"key": name, "type": held, "value": value}


def _checked(archive: tarfile.TarFile, source: Path) -> list[tarfile.TarInfo]:
    """What is to be restored. Raises `InvalidRequest` for what is no backup, or has a name that leads elsewhere."""
    members = archive.getmembers()
    about = json.load(_opened(archive, members[0])) if members and members[0].name == _ABOUT else {}
    if about.get("format") != FORMAT:
        raise InvalidRequest(
            f"{source}: format {about.get('format')} given; this release reads format {FORMAT}, of `stoker backup`."
        )
    for member in members[1:]:
        name = PurePosixPath(member.name)
        is_ours = member.name == _KEYS or (name.parts[:1] and name.parts[0] in FOLDERS and ".." not in name.parts)
        if not is_ours or not member.isreg():
            raise InvalidRequest(f"{source}: {member.name!r} is in it, which no backup has. Nothing was restored.")
    return members[1:]


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    if content is None:
        raise ValueError(f"{member.name} is no file")
    return content


def _restore_file(archive: tarfile.TarFile, member: tarfile.TarInfo, home: Path) -> bool:
    """Whether the file was missing."""
    target = home / member.name
    if target.exists() or target.is_symlink():
        return False
    make_folders(target.parent)
    write_whole(target, lambda draft: draft.write_bytes(_opened(archive, member).read()))
    return True


def _restore_keys(lines: IO[bytes], redis: Any) -> tuple[int, list[str]]:
    added, kept = 0, []
    for line in lines:
        entry = json.loads(line)
        name, kind = str(entry["key"]), keys.kind_of(str(entry["key"]))
        if kind is None or kind.name not in KINDS:
            raise ValueError(f"{name} is no key of a backup")
        if entry["type"] == "set":
            # A set of names: what is missing is added, and nothing is overwritten.
            added += int(redis.sadd(name, *[_bytes(member) for member in entry["value"]]) > 0)
        elif redis.exists(name):
            kept.append(name)
        elif entry["type"] == "hash":
            redis.hset(name, mapping={_bytes(field): _bytes(content) for field, content in entry["value"]})
            added += 1
        else:
            redis.set(name, _bytes(entry["value"]))
            added += 1
    return added, kept


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
