"""A disk that records, and a machine that may lose its power, or a process that may be killed, at every point.

    with powercut.recorded(folder) as disk:
        write_adapter(folder)
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            assert read_adapter(after) in (old, new), cut

`recorded` watches the real files under `folder`: before each system call that changes something there it notes how all
of them stand, and what of it is safe. What is safe: the content that a file had at its last fsync, and the names that a
folder had at its own last fsync. Of the rest a machine that loses its power may keep all, nothing, or a part, so each
point gives several states (`HOW`). What was there at the start is safe.

The calls are seen through Python (`open`, `os`, `pathlib`, `shutil`, `tempfile`). What a library writes by itself,
such as safetensors, is found at the next call that is seen; the states between its own writes are not.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

#: How a point is left: the process was killed and the machine went on; or the power went, and of what was not safe
#: nothing, or the names alone, or the names and half of the contents were on the disk.
HOW = ("killed", "nothing unsafe kept", "names kept, contents lost", "names kept, contents torn")

#: Path below the folder → content of the file; None: a folder.
Tree = Mapping[str, bytes | None]


@dataclass(frozen=True)
class Cut:
    """What a machine, or the next process, finds. `before`: the call that did not happen; empty at the end."""

    before: str
    how: str
    #: What the test had noted by then (`Disk.mark`).
    marks: tuple[str, ...]
    tree: Tree = field(repr=False)

    @property
    def finished(self) -> bool:
        """Whether everything recorded had happened: what returned has to be there."""
        return not self.before

    @contextmanager
    def restored(self, folder: Path) -> Iterator[Path]:
        """The state as real files in `folder`, which is taken away again."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path, content in sorted(self.tree.items()):
            target = folder / path
            (target.parent if content is not None else target).mkdir(parents=True, exist_ok=True)
            if content is not None:
                target.write_bytes(content)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Node:
    """A file or a folder, under any name. `safe`: what a power cut leaves of it."""

    content: bytes | None = None
    names: dict[str, int] = field(default_factory=dict)
    safe_content: bytes = b""
    safe_names: dict[str, int] = field(default_factory=dict)


class Disk:
    """Made by `recorded`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[_Node] = []
        #: Inode → place in `_nodes`, for what has a name now: the system gives an inode that is free to another file.
        self._known: dict[int, int] = {}
        self._root = self._look(folder)
        for node in self._nodes:
            node.safe_content, node.safe_names = node.content or b"", dict(node.names)
        self._marks: list[str] = []
        self._cuts: list[Cut] = []
        self._lock = threading.RLock()

    def mark(self, what: str) -> None:
        """Note that the code under test has promised something: cuts from here on carry it."""
        with self._lock:
            self._marks.append(what)
            self._note(f"going on after {what}")

    def cuts(self) -> list[Cut]:
        """Every state that differs from the one before it at the same `how`, in order."""
        return list(self._cuts)

    def call(self, name: str, action: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with self._lock:
            self._note(name)
            try:
                return action(*args, **options)
            finally:
                self._see()

    def sync(self, action: Callable[..., Any], descriptor: Any) -> Any:
        """fsync: what the descriptor stands for is safe as it is now."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        with self._lock:
            self._note("fsync")
            result = action(descriptor)
            self._see()
            place = self._known.get(os.fstat(number).st_ino)
            if place is not None:
                node = self._nodes[place]
                node.safe_content, node.safe_names = node.content or b"", dict(node.names)
            return result

    def end(self) -> None:
        self._note("")

    def _see(self) -> None:
        """Take in what the files are now."""
        before, self._known = self._known, {}
        self._root = self._look(self._folder, before)

    def _look(self, path: Path, before: Mapping[int, int] | None = None) -> int:
        inode = path.lstat().st_ino
        place = (before or {}).get(inode, self._known.get(inode, -1))
        if place < 0:
            place = len(self._nodes)
            self._nodes.append(_Node())
        self._known[inode] = place
        node = self._nodes[place]
        if path.is_dir() and not path.is_symlink():
            node.names = {child.name: self._look(child, before) for child in sorted(path.iterdir())}
        else:
            node.content = _read(path)
        return place

    def _note(self, before: str) -> None:
        self._see()
        for how in HOW:
            tree = dict(self._walk(self._root, "", how))
            last = next((cut for cut in reversed(self._cuts) if cut.how == how), None)
            cut = Cut(before, how, tuple(self._marks), tree)
            if last is None or not before or (last.tree, last.marks) != (cut.tree, cut.marks):
                self._cuts.append(cut)

    def _walk(self, place: int, path: str, how: str) -> Iterator[tuple[str, bytes | None]]:
        node = self._nodes[place]
        if node.content is not None:
            yield path, _left(node, how)
            return
        if path:
            yield path, None
        for name, child in (node.safe_names if how == "nothing unsafe kept" else node.names).items():
            yield from self._walk(child, f"{path}/{name}" if path else name, how)


def _left(node: _Node, how: str) -> bytes:
    now = node.content or b""
    if how == "killed" or now == node.safe_content:
        return now
    if how == "names kept, contents torn":
        half = len(now) // 2
        return now[:half] + node.safe_content[half:]
    return node.safe_content


@contextmanager
def recorded(folder: Path) -> Iterator[Disk]:
    """Watch what this process does to the files under `folder`."""
    disk = Disk(folder)
    with _patched(disk):
        yield disk
    disk.end()


class Refusal:
    """Made by `refusing`."""

    def __init__(self, at: int, error: int) -> None:
        self._left, self._error = at, error

    @property
    def happened(self) -> bool:
        return self._left <= 0

    def call(self, name: str, action: Callable[..., Any], *args: Any, **options: Any) -> Any:
        frees = name.split()[0] in ("unlink", "remove", "rmdir")
        if self._error == errno.EROFS or not frees:
            self._left -= 1
            if self.happened:
                raise OSError(self._error, os.strerror(self._error))
        return action(*args, **options)

    def sync(self, action: Callable[..., Any], descriptor: Any) -> Any:
        return self.call("fsync", action, descriptor)


@contextmanager
def refusing(at: int, error: int) -> Iterator[Refusal]:
    """A disk that from the call `at` (1: the first) on refuses with `error` what would change it. A full one lets go of
    what it has; one that may only be read (EROFS) does not."""
    refusal = Refusal(at, error)
    with _patched(refusal):
        yield refusal


def each_refusal(error: int, action: Callable[[], object]) -> Iterator[Exception | None]:
    """Do `action` on a disk that refuses the first call, then on one that refuses the second and so on, until it comes
    to its end: what each time it raised."""
    for at in itertools.count(1):
        raised = None
        with refusing(at, error) as refusal:
            try:
                action()
            except Exception as refused:
                raised = refused
        if not refusal.happened:
            assert raised is None, raised
            return
        yield raised


@contextmanager
def _patched(disk: Disk | Refusal) -> Iterator[None]:
    with ExitStack() as patches:
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "symlink"):
            patches.enter_context(mock.patch.object(os, name, _watched(disk, name, getattr(os, name))))
        for name in ("open", "write", "pwrite", "truncate", "ftruncate"):
            patches.enter_context(mock.patch.object(os, name, _watched(disk, name, getattr(os, name))))
        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):
                patches.enter_context(mock.patch.object(os, name, _synced(disk, getattr(os, name))))
        opened = _opened(disk)
        patches.enter_context(mock.patch.object(io, "open", opened))
        patches.enter_context(mock.patch.object(builtins, "open", opened))
        yield


def _watched(disk: Disk | Refusal, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return action(*args, **options)
        return disk.call(f"{name} {_named(args)}", action, *args, **options)

    return call


def _named(args: tuple[Any, ...]) -> str:
    return " → ".join(Path(os.fsdecode(arg)).name for arg in args if isinstance(arg, str | bytes | os.PathLike))


def _synced(disk: Disk | Refusal, action: Callable[..., Any]) -> Callable[..., Any]:
    return lambda descriptor: disk.sync(action, descriptor)


def _read(path: Path, real: Callable[..., Any] = io.open) -> bytes:
    with real(path, "rb") as file:
        return bytes(file.read())


def _opened(disk: Disk | Refusal) -> Callable[..., Any]:
    """`open` whose writing files report to the disk each call of theirs."""
    real = io.open

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            return int(disk.call(f"write to {self.name}", super().write, data))

        def truncate(self, size: int | None = None, /) -> int:
            return int(disk.call(f"truncate {self.name}", super().truncate, size))

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        what = "open" if isinstance(file, int) else f"open {Path(os.fsdecode(file)).name} for {mode}"
        raw = disk.call(what, Raw, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if "b" in mode and buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode  # type: ignore[misc]
        return text

    return opened
