"""The lines of a file of texts, read alike for training and for embedding."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from stoker.errors import DatasetError

_BOM = codecs.BOM_UTF8
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def numbered(pieces: Iterable[bytes], source: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1, without their ends.

    `pieces` are an open file, or lines. A line ends with LF, CR LF or CR, as in Python's text files, and with nothing
    else; a byte order mark at the beginning belongs to no line. Raises `DatasetError` for UTF-16.
    """
    number = 0
    for piece in pieces:
        for line in piece.splitlines() or [b""]:
            number += 1
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
