"""Files of JSON lines that grow line by line: one for each request of a file, with its answer or its error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stoker.files.output import Output

#: How the name of such a file ends.
SUFFIXES = (".jsonl",)


class LineOutput(Output):
    """Lines on their way into a file. `errors`: how many of them say what went wrong."""

    errors = 0
    _bytes = 0

    def write(self, line: Mapping[str, object]) -> None:
        """The next line; one that has an `error` counts as such."""
        # Half a surrogate pair, which an id may hold, is written as JSON writes it: by its number.
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self._put(self._bytes, text)
        self._bytes += len(text)
        self.errors += "error" in line
        self._grown(1)

    def _form(self) -> dict[str, int]:
        return {"bytes": self._bytes, "errors": self.errors}

    def end_of(self, state: Mapping[str, Any]) -> int:
        return int(state["bytes"])

    def _resume(self, state: Mapping[str, Any]) -> None:
        self._bytes, self.errors = state["bytes"], state.get("errors", 0)
        # What follows may be longer than what is written in its place.
        with self._writing():
            self._file.truncate(self._bytes)
