"""The lines of a file of texts, read alike for training and for embedding."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from stoker.contract.shown import as_json
from stoker.errors import DatasetError

#: More than any text of the contract takes, written as JSON with every letter escaped.
MAX_LINE_BYTES = 8 * 2**20
CHUNK = 2**20
_BOM = codecs.BOM_UTF8
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """A file in pieces of whole lines, for `numbered`: a line is read only until it is too long."""
    rest = b""
    while chunk := file.read(CHUNK):
        rest += chunk
        # A CR at the very end may be half of a CR LF.
        end = max(rest.rfind(b"\n"), rest.rfind(b"\r", 0, -1)) + 1
        if end:
            yield rest[:end]
            rest = rest[end:]
        if len(rest) > MAX_LINE_BYTES:
            break
    if rest:
        yield rest


def numbered(pieces: Iterable[bytes], source: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1, without their ends.

    `pieces` are lines, or several whole lines each. A line ends with LF, CR LF or CR, as in Python's text files, and
    with nothing else; a byte order mark at the beginning belongs to no line. Raises `DatasetError` for UTF-16, and for
    a line of more than `MAX_LINE_BYTES`.
    """
    number = 0
    for piece in pieces:
        for line in piece.splitlines() or [b""]:
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DatasetError(
                    f"{source}, line {number}: more than {MAX_LINE_BYTES} bytes, the most that a line may have. Cut "
                    "its text into several lines."
                )
            if number == 1:
                if line.startswith(_UTF16):
                    raise DatasetError(f"{source}: UTF-16, not UTF-8. Save it as UTF-8.")
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, line


def decoded(line: bytes, where: str) -> str:
    """The text of a line. Raises `DatasetError` for one that is no UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise DatasetError(f"{where}: not UTF-8.") from None


class RepeatedField(ValueError):
    """An object of a line has two fields of one name."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: JSON readers differ in which of two fields of one name counts, so a text would be lost, and
    nobody would know. Raises `RepeatedField`."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise RepeatedField(f"the field {as_json(name)} is there twice; name each once")
            seen.add(name)
    return fields
