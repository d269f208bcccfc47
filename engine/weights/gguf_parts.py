"""The parts of a GGUF file that was split (llama.cpp's `gguf-split`): NAME-00001-of-00003.gguf and so on. No MLX."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoker.errors import ModelError

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST = 99_999


def named_parts(name: str) -> list[str]:
    """The names of all parts, if `name` is that of the first of several; else `name` alone."""
    match = _PART.fullmatch(name)
    if match is None or int(match["number"]) != 1 or int(match["count"]) < 2:
        return [name]
    return [_part(match["name"], number, int(match["count"])) for number in range(1, int(match["count"]) + 1)]


def parts(path: Path) -> list[Path]:
    """The files of the model that begins in `path`, as far as they are there."""
    return [file for name in named_parts(path.name) if (file := path.with_name(name)).is_file()]


def _part(name: str, number: int, count: int) -> str:
    return f"{name}-{number:05}-of-{count:05}.gguf"


def other_parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The second to the last part, by the metadata of the first at `path`. Raises `ModelError` for a file that is
    another part, or whose name is not that of a first part, or for a part that is missing."""
    count, number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    for key, value in (("split.count", count), ("split.no", number)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
            raise ModelError(f"{path}: {key} is {value!r}, not a number from 0 to {_MOST}")
    if count < 2:
        if number:
            raise ModelError(f"{path}: split.no is {number}, and split.count {count}; the file is damaged")
        return []
    match = _PART.fullmatch(path.name)
    name = match["name"] if match else path.stem
    if number:
        raise ModelError(f"{path}: part {number + 1} of {count}; name the first, {_part(name, 1, count)}")
    if path.name != _part(name, 1, count):
        raise ModelError(
            f"{path}: the first of {count} parts, which are found by its name: call it {_part(name, 1, count)}"
        )
    found = [path.with_name(_part(name, each, count)) for each in range(2, count + 1)]
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise ModelError(f"{path}: part {missing[0]} is not there ({len(missing)} of {count} parts are missing)")
    return found
