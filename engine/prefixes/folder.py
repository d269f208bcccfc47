"""The folder of all entries: `ROOT/BEGINNING/LENGTH-TOKENS.safetensors`, shared by the workers of a machine.

BEGINNING names the owner and the first tokens, so that a prompt finds those that may serve it by one look, however
many there are. An entry is written whole or not at all (`stoker.files.durable`); one that is not what it has to be is
removed. The entry that served longest ago, by its time of change, goes first.

`ROOT/OWNER.pins` has the entries that do not go: a line each, its path and its bytes. The workers of OWNER's model
write it anew as long as they pin; one that nobody has written for `PINS_LAST` counts for nothing: its model is gone.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.models.openings import shared_length
from engine.prefixes import entry_file
from engine.prefixes.entry_file import DamagedEntry
from engine.prefixes.form import Form
from stoker.files.durable import DRAFT, make_folders, sweep, write_whole

log = logging.getLogger(__name__)

#: Tokens that an entry has at least, and spares at least. Reading and checking one took a hundredth of what
#: prefilling its tokens takes on a CPU (SmolLM2, 64 to 512 tokens), so it is not the reading that would not pay: a
#: pass over the weights takes what 48 tokens take (`engine.generation.grouping.PASS`), and is needed for the rest of
#: the prompt anyway. What is spared has to be more than that.
SHORTEST = 64
#: An entry that is longer than this many times what it would spare is not read for it.
LONGER = 8
#: Entries at most: a prompt is compared with all that begin as it does, a hundred of them in a millisecond.
MOST = 1024
#: Bytes that stay free on the disk: other things need it more.
RESERVE = 256 << 20
#: Seconds between two notes that an entry has served: one is a write, too.
TOUCH_EVERY = 60.0
#: Seconds that pins outlive the last worker of their model.
PINS_LAST = 30 * 24 * 3600.0
_PINS = ".pins"
#: Bytes of a list of pins that are read: nobody writes one as long.
_MOST_PINS = 1 << 16
_NAME = re.compile(r"(\d{1,9})-([0-9a-f]{32})\.safetensors")


@dataclass(frozen=True)
class Found:
    """An entry of `length` tokens, of which the first `shared` are those that were asked for."""

    path: Path
    owner: str
    length: int
    shared: int


class PrefixFolder:
    """Entries under `root` that take `limit` bytes at most. Safe for several threads and processes at once."""

    def __init__(self, root: Path, limit: int, reserve: int = RESERVE) -> None:
        self._root, self.limit, self._reserve = root, limit, reserve
        #: Name of an entry → its tokens: what a name says never changes.
        self._tokens: dict[str, np.ndarray] = {}
        self._refused: set[Path] = set()
        #: Bytes of all entries, when this process looked last.
        self.nbytes = 0

    def find(self, owner: str, wanted: np.ndarray, form: Form) -> Found | None:
        """The entry that shares the longest beginning with `wanted`, int32; `SHORTEST` tokens at least."""
        if len(wanted) < SHORTEST:
            return None
        best: Found | None = None
        for path, length, digest in _entries(self._folder_of(owner, wanted)):
            if path in self._refused:
                continue
            shared = self._shared(path, length, digest, wanted, form)
            if shared >= SHORTEST and (best is None or (shared, -length) > (best.shared, -best.length)):
                best = Found(path, owner, length, shared)
        return best

    def _shared(self, path: Path, length: int, digest: str, wanted: np.ndarray, form: Form) -> int:
        if form.recurrent:
            return length if length <= len(wanted) and _digest(wanted[:length]) == digest else 0
        try:
            kept = self._tokens.get(path.name)
            if kept is None:
                kept = entry_file.read_tokens(path, length)
                if _digest(kept) != digest:
                    raise DamagedEntry("its tokens are not what was written")
                if len(self._tokens) >= 2 * MOST:
                    self._tokens.clear()  # most of them are gone
                self._tokens[path.name] = kept
        except FileNotFoundError:
            return 0  # another process has removed it
        except (DamagedEntry, OSError, MemoryError) as error:
            self._refuse(path, error)
            return 0
        return shared_length(kept, wanted)

    def read(self, found: Found, form: Form) -> tuple[np.ndarray, list[np.ndarray]] | None:
        """Tokens and raw numbers, as `entry_file.read` has them; None for an entry that is gone, or cannot serve."""
        try:
            tokens, arrays = entry_file.read(found.path, found.owner, form, found.length)
            if _digest(tokens) != _digest_of(found.path):
                raise DamagedEntry("its tokens are not what its name says")
        except FileNotFoundError:
            return None
        except (DamagedEntry, OSError, MemoryError) as error:
            self._refuse(found.path, error)
            return None
        self.touch(found.path)
        return tokens, arrays

    def touch(self, path: Path) -> None:
        """Note that an entry serves. Nothing comes of it where the folder may only be read."""
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > TOUCH_EVERY:
                os.utime(path)

    def takes(self, size: int) -> bool:
        """Whether an entry of so many bytes is written at all: one leaves room for others."""
        return 2 * size <= self.limit

    def write(self, owner: str, tokens: np.ndarray, form: Form, arrays: Sequence[np.ndarray]) -> bool:
        """Add an entry; those that served longest ago make room. False: the disk, or what pins leave, has too little
        room. Raises `OSError`."""
        size = entry_file.size(owner, form, len(tokens))
        path = self._path(owner, tokens)
        make_folders(self._root)
        with self._alone():
            self._make_room(size)
            if self.nbytes + size > self.limit or shutil.disk_usage(self._root).free < size + self._reserve:
                return False
            make_folders(path.parent)
            # It says what was asked: only who runs the workers may read it.
            write_whole(path, lambda draft: entry_file.write(draft, owner, form, tokens, arrays), mode=0o600)
            self.nbytes += size
        self._refused.discard(path)
        return True

    # --- pins ---

    def pin(self, owner: str, entries: Sequence[tuple[str, np.ndarray, int]]) -> None:
        """From now on these entries of a model stay, and no others: of each the owner, the tokens, and its bytes. They
        may be written later. Raises `OSError`."""
        path = self._root / f"{owner}{_PINS}"
        if not entries:
            path.unlink(missing_ok=True)
            return
        said = [f"{self._path(of, tokens).relative_to(self._root)} {size}\n" for of, tokens, size in entries]
        make_folders(self._root)
        write_whole(path, lambda draft: draft.write_text("".join(said), encoding="utf-8"), mode=0o600)

    def pinned_bytes(self, without: str) -> int:
        """What entries take that the workers of this machine pin for models other than this owner's."""
        return sum(sum(entries.values()) for owner, entries in self._pins() if owner != without)

    def holds(self, owner: str, tokens: np.ndarray) -> bool:
        """Whether there is an entry of these tokens alone."""
        path = self._path(owner, tokens)
        return path not in self._refused and path.exists()

    def _pins(self) -> Iterator[tuple[str, dict[Path, int]]]:
        """Each owner that pins, with its entries and their bytes. A list that cannot be read pins nothing."""
        for path in self._root.glob(f"[0-9a-f]*{_PINS}"):
            with suppress(OSError, ValueError):
                if time.time() - path.stat().st_mtime > PINS_LAST:
                    path.unlink()
                    continue
                with path.open(encoding="utf-8") as file:
                    lines = [line.rsplit(" ", 1) for line in file.read(_MOST_PINS).splitlines()]
                yield path.name.removesuffix(_PINS), {self._root / name: int(size) for name, size in lines}

    # --- room ---

    def look(self) -> None:
        """Count what there is, and remove what is too much."""
        with suppress(OSError):
            if self._root.is_dir():
                with self._alone():
                    self._make_room(0)

    def _make_room(self, size: int) -> None:
        """Remove entries until one of so many bytes fits; and what writers that died have left."""
        kept = sorted(self._all(), key=lambda entry: entry[0])
        self.nbytes, count = sum(taken for _, taken, _ in kept), len(kept)
        pinned = {path for _, entries in self._pins() for path in entries}
        for _, taken, path in kept:
            if self.nbytes + size <= self.limit and count < MOST:
                return
            if path in pinned:
                continue
            path.unlink(missing_ok=True)
            self.nbytes, count = self.nbytes - taken, count - 1
            # Only an empty one goes.
            with suppress(OSError):
                path.parent.rmdir()

    def _all(self) -> Iterator[tuple[int, int, Path]]:
        """When each entry served last, its bytes, and where it is."""
        for folder in list(self._root.iterdir()):
            if not folder.is_dir():
                continue
            names = os.listdir(folder)
            if any(name.startswith(DRAFT) for name in names):
                sweep(folder)
            for name in names:
                path = folder / name
                with suppress(FileNotFoundError):
                    known = path.stat()
                    yield known.st_mtime_ns, known.st_size, path

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process writes and removes at a time; readers do not wait."""
        with open(self._root / ".lock", "ab") as lock:
            # A file system without locks: entries are whole all the same, and two writers may remove too many.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _refuse(self, path: Path, why: Exception) -> None:
        """Never look at an entry again; remove what is damaged. What cannot be read now may be whole."""
        self._refused.add(path)
        log.warning("the kept prefix %s is not used: %s", path, why)
        if isinstance(why, DamagedEntry):
            with suppress(OSError):
                path.unlink()

    def _path(self, owner: str, tokens: np.ndarray) -> Path:
        return self._folder_of(owner, tokens) / f"{len(tokens)}-{_digest(tokens)}.safetensors"

    def _folder_of(self, owner: str, tokens: np.ndarray) -> Path:
        """`ROOT/BEGINNING`, where the entries are that may serve these tokens."""
        return self._root / hashlib.sha256(owner.encode() + tokens[:SHORTEST].tobytes()).hexdigest()[:32]


def _entries(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Each entry of a beginning's folder, how many tokens it has, and their digest."""
    try:
        names = os.listdir(folder)
    except OSError:
        # Most prompts begin as none before: no such folder. One that cannot be read has nothing for us either.
        return
    for name in names:
        if (match := _NAME.fullmatch(name)) is not None:
            yield folder / name, int(match[1]), match[2]


def _digest_of(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match[2]


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:32]
