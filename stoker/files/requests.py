"""The requests of a file of JSON lines, and what becomes of each: one line too. Read line by line, never as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.contract import GenerateResult
from stoker.contract.shown import as_json
from stoker.errors import DatasetError, InvalidRequest, StokerError
from stoker.files.source import Again, Line, lines_of, parsed

#: Fields by which a line is known to its author.
_IDS = ("id", "custom_id")


@dataclass(frozen=True)
class RequestLine:
    """A line of the file. `known_by`: its own `id` or `custom_id`. `fields`: what it asks, or why it asks nothing."""

    number: int
    known_by: dict[str, str | int]
    fields: dict[str, Any] | InvalidRequest

    def answered(self, answer: GenerateResult | StokerError) -> dict[str, Any]:
        """The line that says what became of it."""
        line: dict[str, Any] = {"line": self.number, **self.known_by}
        if isinstance(answer, StokerError):
            return line | {"error": {"type": type(answer).__name__, "message": str(answer)}}
        return line | {"result": answer.model_dump(mode="json")}


@dataclass(frozen=True)
class RequestFile:
    """A file of JSON lines, each a request. Blank lines count for nothing."""

    path: Path

    def survey(self) -> tuple[int, str]:
        """How many requests there are, and a digest of the whole file. What is wrong with one is its own matter; raises
        `DatasetError` for a file without any, or with a line that is too long."""
        count, digest = 0, hashlib.sha256()
        for _, line in lines_of(self.path):
            digest.update(line + b"\n")
            count += 1
        if not count:
            raise DatasetError(f"{self.path}: no request in it.")
        return count, digest.hexdigest()

    def again(self, rows: int, digest: str) -> Again:
        """To read what `survey` has counted."""
        return Again(self.path, rows, digest)

    def requests(self, lines: Iterator[Line] | None = None) -> Iterator[RequestLine]:
        """One for each of `lines`, or of all that the file has."""
        for number, line in lines or lines_of(self.path):
            try:
                row = parsed(line, f"{self.path.name}, line {number}")
                yield _request(number, row)
            except InvalidRequest as error:
                yield RequestLine(number, {}, error)


def _request(number: int, row: object) -> RequestLine:
    if not isinstance(row, dict):
        raise InvalidRequest(f"{as_json(row)} given; expected an object with prompt or messages, and options.")
    given = [name for name in _IDS if name in row]
    if len(given) > 1:
        raise InvalidRequest("id and custom_id given; at most one of them.")
    known_by = {name: _checked_id(name, row[name]) for name in given}
    return RequestLine(number, known_by, {name: value for name, value in row.items() if name not in _IDS})


def _checked_id(name: str, value: object) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidRequest(f"{name}: {as_json(value)} given; expected a text or a whole number.")
    return value
