"""Files of JSON lines that grow line by line: one for each request of a file, with its answer or its error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.files.output import Output

#: How the name of such a file ends.
SUFFIXES = (".jsonl",)


@dataclass(frozen=True)
class _Mark:
    """What the first `rows` lines are: their bytes, and how many of them say what went wrong."""

    rows: int = 0
    bytes: int = 0
    errors: int = 0


class LineOutput(Output):
    """Lines on their way into a file. `errors`: how many of them say what went wrong."""

    #: Of the lines that are there, and of those with the one that is being written: an interrupt may come between any
    #: two steps, and the record must be of as many lines as it says.
    _marks = (_Mark(), _Mark())

    @property
    def errors(self) -> int:
        return self._mark.errors

    @property
    def _mark(self) -> _Mark:
        before, after = self._marks
        return after if after.rows == self.done else before

    def write(self, line: Mapping[str, object]) -> None:
        """The next line; one that has an `error` counts as such."""
        # Half a surrogate pair, which an id may hold, is written as JSON writes it: by its number.
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        mark = self._mark
        self._put(mark.bytes, text)
        self._marks = mark, _Mark(mark.rows + 1, mark.bytes + len(text), mark.errors + ("error" in line))
        self._grown(1)

    def _form(self) -> dict[str, int]:
        return {"bytes": self._mark.bytes, "errors": self.errors}

    def end_of(self, state: Mapping[str, Any]) -> int:
        return int(state["bytes"])

    def _resume(self, state: Mapping[str, Any]) -> None:
        mark = _Mark(state["done"], state["bytes"], state.get("errors", 0))
        self._marks = mark, mark
        # What follows may be longer than what is written in its place.
        with self._writing():
            self._file.truncate(mark.bytes)
