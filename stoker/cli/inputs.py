"""What a command reads: a file, or standard input for `-`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from stoker.contract.lines import decoded, numbered
from stoker.contract.requests import MAX_TEXT_CHARS
from stoker.errors import InvalidRequest

STDIN = "-"
#: What messages call it.
STDIN_NAME = "standard input"
#: How the names of files end that texts are read from, and requests.
OF_TEXTS, OF_REQUESTS = (".jsonl", ".txt"), (".jsonl",)
#: Bytes of the longest text: no character of UTF-8 has more than four.
_LONGEST = 4 * MAX_TEXT_CHARS
#: Characters of the longest name of a file.
_LONGEST_NAME = 255


def stdin() -> BinaryIO:
    """Standard input, as bytes, because the terminal does not decide which encoding a text has."""
    found: BinaryIO = sys.stdin.buffer
    return found


def read_text(name: str) -> str:
    """All of standard input as one text; `name` says what for. Raises `InvalidRequest`."""
    data = stdin().read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise InvalidRequest(
            f"{name}: {STDIN_NAME} has more than {_LONGEST} bytes; at most {MAX_TEXT_CHARS} characters."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name}: {STDIN_NAME} is not UTF-8.") from None


def read_json(name: str, given: str) -> Any:
    """The JSON of a file. Raises `InvalidRequest`."""
    shown = STDIN_NAME if given == STDIN else given
    try:
        if given == STDIN:
            return json.loads(read_text(name))
        with open(given, "rb") as file:
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise InvalidRequest(f"{name}: {shown} has more than {_LONGEST} bytes.")
        return json.loads(data)
    except RecursionError:
        raise InvalidRequest(f"{name}: {shown} is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{name}: {shown} cannot be read as JSON ({error}).") from None


def refuse_without_output(*, in_flight: int | None, overwrite: bool, batch: bool = False) -> None:
    """What is for a file alone would change nothing. Raises `InvalidRequest`."""
    for name, given in (("in-flight", in_flight is not None), ("overwrite", overwrite), ("batch", batch)):
        if given:
            raise InvalidRequest(f"--{name}: given without --output; it is for a file. Leave it out.")


def is_unnamed(given: str) -> bool:
    """Whether no name says what is in it: standard input, or a pipe such as `<(…)`."""
    return given == STDIN or (is_pipe(given) and not Path(given).suffix)


def is_file(given: str) -> bool:
    """Whether there is a regular file of that name. A text that can be no name, because it is too long, is none."""
    try:
        return Path(given).is_file()
    except OSError:
        return False


def refuse_names(texts: list[str], endings: tuple[str, ...], remedy: str) -> None:
    """Raise `InvalidRequest` for a file's name in the place of a text: it would be taken for one, in silence.
    `endings`: those of files that the command reads; `remedy`: what to do about one that is there."""
    for text in texts:
        if not text.endswith(endings):
            continue
        if is_file(text):
            raise InvalidRequest(f"{text} is a file: {remedy}")
        # What has a blank in it is more likely a text.
        if len(text) <= _LONGEST_NAME and len(text.split()) == 1:
            raise InvalidRequest(f"{text}: there is no such file. Give a text that ends so on {STDIN_NAME}: '{STDIN}'.")


def is_pipe(given: str) -> bool:
    """As `is_file`, of a pipe such as `<(…)`."""
    try:
        return Path(given).is_fifo()
    except OSError:
        return False


@contextmanager
def as_file(given: str) -> Iterator[Path]:
    """A file that can be read twice, and by another process: of standard input and of pipes (`<(…)`) a copy."""
    path = Path(given)
    if given != STDIN and not is_pipe(given):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stoker-") as home:
        copy = Path(home, STDIN_NAME if given == STDIN else path.name)
        with copy.open("wb") as target:
            if given == STDIN:
                shutil.copyfileobj(stdin(), target)
            else:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, target)
        yield copy


def lines() -> Iterator[str]:
    """The lines of standard input as they come. Raises `DatasetError` for one that is no UTF-8."""
    for number, line in numbered(stdin(), STDIN_NAME):
        yield decoded(line, f"{STDIN_NAME}, line {number}")
