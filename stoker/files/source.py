"""The texts of a file: JSON lines, one field of each, or plain lines. Read line by line, never as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stoker.contract.lines import RepeatedField, decoded, numbered, pieces, unrepeated
from stoker.contract.requests import MAX_TEXT_CHARS
from stoker.contract.shown import as_json
from stoker.errors import DatasetError
from stoker.files.output import Output

#: Fields of a line that an error names: a row of a table may have thousands.
MOST_NAMES = 20
#: A line's number in its file, from 1, and its bytes.
Line = tuple[int, bytes]


@dataclass(frozen=True)
class Source:
    """A file of texts: `field` of each JSON line; in a `.txt`, and with `plain`, each line itself. Blank lines count
    for nothing."""

    path: Path
    field: str
    plain: bool = False

    def texts(self, lines: Iterator[Line] | None = None) -> Iterator[str]:
        """Those of `lines`, or of all that the file has. Raises `DatasetError` with the number of a line that is wrong,
        from 1."""
        for number, line in lines or lines_of(self.path):
            yield self._text(line, f"{self.path.name}, line {number}")

    def survey(self) -> tuple[int, str]:
        """Check every line: how many texts there are, and a digest of the whole file."""
        count, digest = 0, hashlib.sha256(self.field.encode())
        for number, line in lines_of(self.path):
            digest.update(line + b"\n")
            self._text(line, f"{self.path.name}, line {number}")
            count += 1
        if not count:
            raise DatasetError(f"{self.path.name}: no text in it.")
        return count, digest.hexdigest()

    def again(self, rows: int, digest: str) -> Again:
        """To read what `survey` has counted."""
        return Again(self.path, rows, digest, self.field.encode())

    def _text(self, line: bytes, where: str) -> str:
        text = decoded(line, where) if self.plain or self.path.suffix == ".txt" else self._field_of(line, where)
        if not text.strip():
            raise DatasetError(f"{where}: the text is blank.")
        if len(text) > MAX_TEXT_CHARS:
            raise DatasetError(f"{where}: {len(text)} characters; at most {MAX_TEXT_CHARS}.")
        return text

    def _field_of(self, line: bytes, where: str) -> str:
        row, field = parsed(line, where), as_json(self.field)
        if not isinstance(row, dict):
            raise DatasetError(f"{where}: {as_json(row)} given; expected an object with {field} in it.")
        text = row.get(self.field)
        if not isinstance(text, str):
            found = f"{field} is {as_json(text)}" if self.field in row else f"no field {field}"
            names = [as_json(name, 60) for name in islice(row, MOST_NAMES)] + ["…"] * (len(row) > MOST_NAMES)
            raise DatasetError(f"{where}: {found}; it has {', '.join(names) or 'nothing'}. Name one: --field.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DatasetError(f"{where}: {field} holds half a surrogate pair, which is no text.") from None
        return text


class Again:
    """A file that was surveyed, read again: as many lines as were counted, which a writer may have changed since."""

    def __init__(self, path: Path, rows: int, digest: str, begins: bytes = b"") -> None:
        """`digest`: of `begins` and all lines, as they were counted."""
        self._path, self._rows, self._counted = path, rows, digest
        self._read, self._grown = hashlib.sha256(begins), False

    def lines(self) -> Iterator[Line]:
        left = self._rows
        for number, line in lines_of(self._path):
            if not left:
                self._grown = True
                return
            left -= 1
            self._read.update(line + b"\n")
            yield number, line

    def check(self, output: Output) -> None:
        """Once all were read. Raises `DatasetError` where the file is not what was counted; rows of `output` that may
        be of other lines are not gone on with."""
        if self._read.hexdigest() != self._counted:
            output.forget()
            raise DatasetError(
                f"{self._path.name}: its {self._rows} rows have changed since they were counted. Nothing made of them "
                "is kept; give the command again."
            )
        if self._grown:
            raise DatasetError(
                f"{self._path.name}: it has more than the {self._rows} rows that were counted. Those are done, and "
                "kept: give the command again with them alone, and the others in another file. Or pass --overwrite to "
                "begin anew."
            )


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, with their numbers from 1. Raises `DatasetError` where it cannot be
    read."""
    try:
        with path.open("rb") as file:
            yield from numbered(pieces(file), path.name)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}).") from None


def parsed(line: bytes, where: str) -> Any:
    """The JSON of a line. Raises `DatasetError`."""
    try:
        return json.loads(decoded(line, where), object_pairs_hook=unrepeated)
    except RepeatedField as error:
        raise DatasetError(f"{where}: {error}.") from None
    except RecursionError:
        raise DatasetError(f"{where}: nested too deeply.") from None
    except ValueError as error:
        raise DatasetError(f"{where}: not JSON ({error}).") from None
