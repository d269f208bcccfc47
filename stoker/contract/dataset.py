"""Training data: JSON lines, each `{"text": …}` or `{"prompt": …, "completion": …}`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stoker.errors import DatasetError

MAX_EXAMPLES = 1_000_000
MAX_DATASET_BYTES = 64 * 2**20

_ALLOWED = '{"text": …} or {"prompt": …, "completion": …}'


@dataclass(frozen=True)
class Example:
    """One example. The loss counts `completion` alone; a plain text is a completion of nothing."""

    prompt: str
    completion: str

    def to_line(self) -> str:
        fields = {"prompt": self.prompt, "completion": self.completion} if self.prompt else {"text": self.completion}
        return json.dumps(fields, ensure_ascii=False)


def read_lines(lines: Iterable[str | bytes], source: str) -> list[Example]:
    """Parse JSON lines; blank ones are skipped. A wrong one raises `DatasetError` with its number, from 1."""
    examples = [_parse(line, f"{source}, line {number}") for number, line in _numbered(lines)]
    return _checked(examples, source)


def read_mappings(rows: Iterable[Mapping[str, Any]], source: str) -> list[Example]:
    """The same for objects that are there already; a wrong one is named by its place, from 1."""
    return _checked([_example(row, f"{source}, item {number}") for number, row in enumerate(rows, 1)], source)


def _numbered(lines: Iterable[str | bytes]) -> Iterator[tuple[int, str | bytes]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _checked(examples: list[Example], source: str) -> list[Example]:
    if not examples:
        raise DatasetError(f"{source}: no example in it; expected one JSON object a line, {_ALLOWED}.")
    if len(examples) > MAX_EXAMPLES:
        raise DatasetError(f"{source}: {len(examples)} examples; at most {MAX_EXAMPLES}.")
    return examples


def _parse(line: str | bytes, where: str) -> Example:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise DatasetError(f"{where}: not UTF-8.") from None
    except RecursionError:
        raise DatasetError(f"{where}: nested too deeply; expected {_ALLOWED}.") from None
    except ValueError as error:
        raise DatasetError(f"{where}: not JSON ({error}); expected {_ALLOWED}.") from None
    return _example(row, where)


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, Mapping):
        raise DatasetError(f"{where}: a {type(row).__name__} given; expected an object, {_ALLOWED}.")
    fields = set(row)
    if fields == {"text"}:
        prompt, completion = "", row["text"]
    elif fields == {"prompt", "completion"}:
        prompt, completion = row["prompt"], row["completion"]
    else:
        given = ", ".join(sorted(map(str, fields))) or "no fields"
        raise DatasetError(f"{where}: {given} given; expected {_ALLOWED}.")
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {name} is a {type(value).__name__}; expected text.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DatasetError(f"{where}: {name} holds half a surrogate pair, which is no text.") from None
    if not completion.strip():
        raise DatasetError(f"{where}: the text to learn is empty.")
    return Example(prompt=prompt, completion=completion)
