"""A backup: adapters, runs, and what the broker keeps for good, in one file.

The file is a gzipped tar archive: `backup.json` says what it is, `broker.jsonl` has the broker's durable keys that
people made (the registry of adapters, their files, pinned prefixes, the policy, hashes of the gateway's keys),
`adapters/` and `runs/` are the folders of STOKER_HOME. Jobs that wait, results and streams are not in it: they live for
days, and their clients send them again.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import stoker
from stoker.broker import keys
from stoker.broker.restored import Restored, Value
from stoker.errors import InvalidRequest
from stoker.files.durable import DRAFT, make_folders, write_whole
from stoker.local.home import make_home
from stoker.settings import Settings

#: The version of the archive's layout.
FORMAT = 1
#: The folders of STOKER_HOME that are kept.
FOLDERS = ("adapters", "runs")
#: The kinds of keys that are kept (`stoker.broker.keys.KINDS`).
KINDS = ("adapters", "adapter", "artifact", "prefixes", "policy", "api_keys")
_ABOUT, _KEYS = "backup.json", "broker.jsonl"
#: Bytes that are read of `backup.json` and of a line of `broker.jsonl`, whose longest holds an artifact.
MAX_ABOUT, MAX_LINE = 1 << 16, 1 << 30
#: Bytes of a name, and of all that a header says of one file: tarfile reads a header whole.
MAX_NAME, MAX_HEADER = 1024, 1 << 20
#: Files: each costs memory before the first is restored.
MAX_FILES = 200_000
#: Files of one folder that are open at once: more than a checkpoint or an adapter has.
WHOLE = 64
#: Seconds since the epoch from which on a time is no file's.
LAST_TIME = 1 << 33
#: What comes of reading a file that is no archive, or not a whole one.
_UNREADABLE = (
    *(tarfile.TarError, gzip.BadGzipFile, zlib.error),
    *(EOFError, ValueError, OverflowError, RecursionError),
)


@dataclass(frozen=True)
class Counted:
    """What went into a backup or came out of it. `kept`: names that were there already, and stay as they are.
    `api_keys`: ids of the gateway's keys that count again."""

    files: int
    keys: int
    kept: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()


def backup(settings: Settings, redis: Any, target: Path) -> Counted:
    """Write everything to `target`, whole or not at all; a former backup makes way. Raises `InvalidRequest` for another
    file in its place and for more files than a restore takes, `OSError`, and redis-py's errors."""
    _check_target(target)
    counted = Counted(0, 0)
    count = sum(len(files) for _, files in _folders(settings.home))
    # With the two that the archive has of its own.
    if count + 2 > MAX_FILES:
        raise InvalidRequest(
            f"{settings.home}: {count:,} files of adapters and runs; a backup has fewer than {MAX_FILES:,}. "
            "Remove what is old: `stoker clean`, `stoker runs remove`, `stoker adapters remove`."
        )

    def write(draft: Path) -> None:
        nonlocal counted
        # The fastest level: the weights of adapters hardly shrink.
        with tarfile.open(draft, "w:gz", compresslevel=1) as archive:
            about = {"format": FORMAT, "stoker": stoker.__version__, "made": time.time()}
            _add_bytes(archive, _ABOUT, json.dumps(about).encode(), int(time.time()))
            added = sum(_add_files(archive, *found, settings.home) for found in _folders(settings.home))
            counted = Counted(added, _add_keys(archive, redis))

    write_whole(target, write, mode=0o600)
    return counted


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise InvalidRequest(f"{target}: a folder given; name the file that is to be written there.")
    if os.path.lexists(target) and not _is_backup(target):
        raise InvalidRequest(f"{target} is there already, and is no backup of `stoker backup`. Name another file.")


def _is_backup(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with _Unpacked(file) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
            first = archive.next()
            return first is not None and first.name == _ABOUT
    except _UNREADABLE:
        return False


def restore(settings: Settings, redis: Any, source: Path, *, gateway_keys: bool = True) -> Counted:
    """Put back what is missing. What is there already stays: a restore never overwrites, and may be run again.
    `gateway_keys`: those too, also the ones that were revoked since.

    Raises `InvalidRequest` for a file that is no backup, `ConfigError` for a home that cannot be written, `OSError`,
    and redis-py's errors.
    """
    files, added, kept = 0, 0, []
    try:
        with _Unpacked(source) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
            # All names and keys first, so that nothing of a file that is no backup is restored.
            members = _checked(archive, source, settings.home)
            make_home(settings.home)
            restored = Restored(redis)
            # The registry first: it says which files are those of its versions.
            for member in sorted(members, key=lambda member: member.name != _KEYS):
                if member.name == _KEYS:
                    added, found = _restore_keys(_opened(archive, member), restored, gateway_keys)
                    kept += found
                elif not _is_of_another(member.name, restored) and _restore_file(archive, member, settings.home):
                    files += 1
                else:
                    kept.append(member.name)
    except _UNREADABLE as error:
        raise InvalidRequest(f"{source}: no whole backup of `stoker backup` ({error}).") from None
    return Counted(files, added, tuple(kept), tuple(restored.api_keys))


class _Unpacked(gzip.GzipFile):
    """What is packed in a backup. The content of files is read in small pieces; a large piece is a header."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header of {size} bytes; at most {MAX_HEADER} are read")
        return super().read(size)


def _add_bytes(archive: tarfile.TarFile, name: str, data: bytes, changed: float) -> None:
    """`changed`: seconds since the epoch."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o600, changed
    archive.addfile(entry, io.BytesIO(data))


def _is_kept(path: Path, home: Path) -> bool:
    """Regular files alone, and no drafts."""
    return not path.is_symlink() and path.is_file() and DRAFT not in path.relative_to(home).as_posix()


def _folders(home: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder with its files that are kept. A folder is looked into when those before it have been used: workers
    go on, and what was listed long ago is gone. Those within it come first: a run's log reaches as far as its
    checkpoints."""
    for name in FOLDERS:
        yield from _folders_in(home / name, home)


def _folders_in(folder: Path, home: Path) -> Iterator[tuple[Path, list[Path]]]:
    found = next(os.walk(folder), None)
    if found is None:
        return
    _, folders, names = found
    for name in sorted(folders):
        if not (folder / name).is_symlink():
            yield from _folders_in(folder / name, home)
    yield folder, [path for name in sorted(names) if _is_kept(path := folder / name, home)]


def _add_files(archive: tarfile.TarFile, folder: Path, files: Sequence[Path], home: Path) -> int:
    """How many of a folder's files were there still. One that goes or grows meanwhile is in the archive as it was when
    it was opened. A folder that goes, as old checkpoints do, is in it whole or not at all: no run goes on from half a
    checkpoint."""
    added = 0
    for start in range(0, len(files), WHOLE):
        wanted = files[start : start + WHOLE]
        with ExitStack() as stack:
            opened = [file for path in wanted if (file := _open(path, stack)) is not None]
            if len(opened) < len(wanted) and not folder.exists():
                break
            for file in opened:
                name = Path(file.name).relative_to(home).as_posix()
                _add_bytes(archive, name, file.read(), os.fstat(file.fileno()).st_mtime)
            added += len(opened)
    return added


def _open(path: Path, stack: ExitStack) -> BinaryIO | None:
    """None for one that has gone."""
    try:
        return stack.enter_context(path.open("rb"))
    except FileNotFoundError:
        return None


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
        if held != kind.type:
            # Another program's value: Stoker writes no other type under these names.
            continue
        value = _exported_value(redis, key, held)
        # One that goes after its type was asked for is left out: no key is an empty hash, and no restore takes one.
        if value not in (None, []):
            yield {"key": name, "type": held, "value": value}


def _exported_value(redis: Any, key: bytes, held: str) -> list[Any] | str | None:
    if held == "hash":
        return [[_text(field), _text(content)] for field, content in redis.hgetall(key).items()]
    if held == "set":
        return [_text(member) for member in sorted(redis.smembers(key))]
    found = redis.get(key)
    return None if found is None else _text(found)


def _checked(archive: tarfile.TarFile, source: Path, home: Path) -> list[tarfile.TarInfo]:
    """What is to be restored. Raises `InvalidRequest` for what is no backup, or has a name that leads elsewhere, and
    `ValueError` for a key that no backup has."""
    members = list(islice(archive, MAX_FILES + 1))
    if len(members) > MAX_FILES:
        raise ValueError(f"more than {MAX_FILES:,} files")
    stated = _format(archive, members[0]) if members else None
    if stated != FORMAT:
        raise InvalidRequest(
            f"{source}: format {stated} given; this release reads format {FORMAT}, of `stoker backup`."
        )
    names = [member.name for member in members[1:]]
    if len(names) != len(set(names)):
        raise ValueError("a name is in it twice")
    for member in members[1:]:
        if not _is_ours(member):
            raise InvalidRequest(
                f"{source}: {member.name[:200]!r} is in it, which no backup has. Nothing was restored."
            )
        for folder in list(PurePosixPath(member.name).parents)[:-1]:
            if str(folder) in names or ((home / folder).exists() and not (home / folder).is_dir()):
                raise InvalidRequest(f"{source}: {folder} is a folder in it, and a file too. Nothing was restored.")
        if member.name == _KEYS:
            for line in _lines(_opened(archive, member)):
                _key(line)
    return members[1:]


def _format(archive: tarfile.TarFile, first: tarfile.TarInfo) -> object:
    """The format that the archive says it has; None if it says none."""
    if first.name != _ABOUT or not first.isreg() or first.size > MAX_ABOUT:
        return None
    about = json.load(_opened(archive, first))
    return about.get("format") if isinstance(about, dict) else None


def _is_ours(member: tarfile.TarInfo) -> bool:
    """Whether it is a file that a backup has, of a name that leads into the folders that are kept."""
    name = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        return False
    if member.name == _KEYS:
        return True
    plain = name.as_posix() == member.name and not {"..", "\0"} & {*name.parts, *member.name}
    fits = len(os.fsencode(member.name)) <= MAX_NAME and all(len(os.fsencode(part)) <= 255 for part in name.parts)
    return plain and fits and len(name.parts) > 1 and name.parts[0] in FOLDERS


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
    make_folders(target.parent, mode=0o700)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            shutil.copyfileobj(_opened(archive, member), file)
        # Of an adapter's runs the newest is that whose file changed last: it is meant by the name, and stays.
        if 0 <= member.mtime < LAST_TIME:
            os.utime(draft, (member.mtime, member.mtime))

    write_whole(target, write, mode=0o600)
    return True


def _restore_keys(lines: IO[bytes], restored: Restored, gateway_keys: bool) -> tuple[int, list[str]]:
    added, kept = 0, []
    for line in _lines(lines):
        key = _key(line)
        if key.name == keys.API_KEYS and not gateway_keys:
            continue
        if restored.put_back(key.name, key.value):
            added += 1
        else:
            kept.append(key.name)
    return added, kept


def _is_of_another(name: str, restored: Restored) -> bool:
    """Whether it is a file of a version under whose number the broker knows another."""
    parts = PurePosixPath(name).parts
    return parts[0] == "adapters" and len(parts) > 4 and restored.is_another(*parts[1:4])


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"a line of {_KEYS} has more than {MAX_LINE} bytes")
        yield line


@dataclass(frozen=True)
class _Key:
    """A key that is to be restored."""

    name: str
    value: Value


def _key(line: bytes) -> _Key:
    """A line of `broker.jsonl`. Raises `ValueError` for what no backup has."""
    entry = json.loads(line)
    name = entry.get("key") if isinstance(entry, dict) else None
    kind = keys.kind_of(name) if isinstance(name, str) else None
    if kind is None or kind.name not in KINDS or entry.get("type") != kind.type:
        raise ValueError(f"{str(name)[:200]!r} is no key of a backup, or of another type")
    try:
        return _Key(str(name), _value(kind.type, entry.get("value")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the value of {name} is not as a backup has it: {error}") from None


def _value(kind: str, value: Any) -> Value:
    if kind == "string":
        return _bytes(value)
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} given; expected a list")
    if kind == "set":
        return [_bytes(member) for member in value]
    if not value:
        raise ValueError("an empty hash")
    return {_bytes(field): _bytes(content) for field, content in value}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
