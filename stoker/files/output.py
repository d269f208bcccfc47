"""Files that grow row by row, survive an interruption, and appear under their name only when whole.

Until then the rows lie in `NAME.partial`, and `NAME.partial.json` says for what input and how many rows are safely on
disk. A later run of the same input goes on behind those; anything after them is written again. What a row is and where
it lies, the file's kind says: vectors (`vector_output.py`), or lines (`line_output.py`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from stoker.errors import InvalidRequest
from stoker.files.durable import flush, write_whole
from stoker.files.locks import try_lock

#: Seconds between two moments at which the rows so far are made safe.
SAFE_EVERY = 2.0

Out = TypeVar("Out", bound="Output")


def check_path(path: Path, suffixes: Iterable[str], overwrite: bool) -> None:
    """Raises `InvalidRequest` for an output that cannot be written, before any work is done for it."""
    if path.suffix not in suffixes:
        raise InvalidRequest(f"--output: {path.name!r} given; it has to end in {', '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise InvalidRequest(f"--output: there is no folder {path.parent}.")
    if path.exists() and not overwrite:
        raise InvalidRequest(f"--output: {path} is there already. Name another, or pass --overwrite.")


def check_apart(path: Path, source: Path) -> None:
    """Raises `InvalidRequest` where `source`, which is still to be read, would be written over: as the output itself,
    or as what there is of it before it is whole."""
    for written in (path, partial_path(path), state_path(path)):
        if written.exists() and source.exists() and written.samefile(source):
            raise InvalidRequest(
                f"--output: {path} given, which would be written over its input {source}. Name another file."
            )


class Output:
    """Rows on their way into `path`, which holds `rows` of them in the end. Written to within `opened`."""

    _file: BinaryIO

    def __init__(self, path: Path, rows: int, job: Mapping[str, Any]) -> None:
        self.path, self._rows = path, rows
        # As it is read again: JSON has no tuples.
        self._job: dict[str, Any] = json.loads(json.dumps(dict(job)))
        self._safe_at = time.monotonic()
        #: Rows that are there, and those of them that outlast a power cut.
        self.done = self._safe = 0

    def _form(self) -> dict[str, int]:
        """What `end_of` and `_resume` have to know besides the number of rows."""
        raise NotImplementedError

    def end_of(self, state: Mapping[str, Any]) -> int:
        """How many bytes the rows take that `state` vouches for."""
        raise NotImplementedError

    def _resume(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _put(self, offset: int, data: bytes) -> None:
        try:
            self._file.seek(offset)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            # Those before it are whole, and the error says how many there are.
            with suppress(InvalidRequest):
                self.make_safe()
            raise self._untaken(error) from None

    def _grown(self, rows: int) -> None:
        """That many rows were put behind the others. Every two seconds those so far are made safe."""
        self.done += rows
        if time.monotonic() - self._safe_at >= SAFE_EVERY:
            self.make_safe()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that takes nothing is the user's to mend: `InvalidRequest`."""
        try:
            yield
        except OSError as error:
            raise self._untaken(error) from None

    def _untaken(self, error: OSError) -> InvalidRequest:
        return InvalidRequest(
            f"--output: {self.path} cannot be written ({error.strerror}); the first {self._safe} of its {self._rows} "
            "rows are safe. Mend that and give the command again: it goes on behind them."
        )

    def make_safe(self) -> None:
        """Flush the rows to the disk, then record in the state file how many there are."""
        self._safe_at = time.monotonic()
        if not self.done:
            return
        record = json.dumps({"job": self._job, "done": self.done, **self._form()})
        with self._writing():
            flush(partial_path(self.path))
            # `write_whole` flushes the folder too, and so the name of the partial file.
            write_whole(state_path(self.path), lambda draft: draft.write_text(record, "utf-8"))
        self._safe = self.done

    def forget(self) -> None:
        """The rows so far are not to be gone on with."""
        self.done = 0
        state_path(self.path).unlink(missing_ok=True)

    def finish(self) -> None:
        """Every row is there: give the file its name."""
        assert self.done == self._rows, f"{self.done} of {self._rows} rows are there"
        self.make_safe()
        with self._writing():
            self._give_name()
            flush(self.path.parent)
            state_path(self.path).unlink()

    def _give_name(self) -> None:
        partial_path(self.path).replace(self.path)

    def begin(self, file: BinaryIO, overwrite: bool) -> None:
        """Go on where an earlier run for the same job stopped, or begin anew. Where no file is to be replaced,
        `overwrite` means the latter."""
        self._file = file
        state = {} if overwrite and not self.path.exists() else self._state()
        if state and state["job"] != self._job and not overwrite:
            differing = ", ".join(name for name in self._job if state["job"].get(name) != self._job[name])
            raise InvalidRequest(
                f"--output: {partial_path(self.path)} is of an interrupted run with another {differing}. Give the "
                "same, or pass --overwrite to begin anew."
            )
        if state and state["job"] == self._job:
            self._resume(state)
            self.done = self._safe = state["done"]
        else:
            # The record first, and for good: it would vouch for rows that are not those it was written for.
            state_path(self.path).unlink(missing_ok=True)
            flush(self.path.parent)
            file.truncate(0)

    def _state(self) -> dict[str, Any]:
        """What an interrupted run left, if it fits the rows that are there."""
        try:
            state: dict[str, Any] = json.loads(state_path(self.path).read_text("utf-8"))
            fits = os.fstat(self._file.fileno()).st_size >= self.end_of(state)
            return state if fits and isinstance(state["job"], dict) and isinstance(state["done"], int) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


@contextmanager
def opened(output: Out, overwrite: bool = False) -> Iterator[Out]:
    """`output`, which goes on where an earlier run for the same job stopped, or begins anew.

    On leaving by an error the rows so far are made safe. Raises `InvalidRequest` if another run is writing it, or if
    a run for another job was interrupted and `overwrite` is False.
    """
    path = output.path
    try:
        descriptor = os.open(partial_path(path), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InvalidRequest(f"--output: {partial_path(path)} cannot be written ({error.strerror}).") from None
    # Without a buffer: what a full disk did not take would be tried again when the file is closed.
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        try:
            alone = try_lock(file)
        except OSError as error:
            raise InvalidRequest(f"--output: {path} is where no file can be locked ({error.strerror}).") from None
        # Another run may have ended in between: then this is its whole file, under its own name by now.
        if not alone or not _is_at(file, partial_path(path)):
            raise InvalidRequest(f"--output: another run is writing {path} just now.")
        output.begin(file, overwrite)
        try:
            yield output
        except BaseException:
            with suppress(InvalidRequest):  # of a disk that takes nothing, the first error says more
                output.make_safe()
            raise


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether `path` is a name of this very file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def state_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial.json")
