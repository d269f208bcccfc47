"""The JSON files of a folder with weights: read within a limit, written whole."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from stoker.contract.shown import as_json
from stoker.errors import ModelError
from stoker.files.durable import write_whole

#: A configuration is a few hundred bytes; a tokenizer's, which lists its special tokens, up to 2 MB.
MAX_BYTES = 16 << 20
#: Objects and lists in one another; real files have some five.
MAX_DEPTH = 100
_FLOAT, _FLOATS = "__float__", {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
#: What Stoker knows of an adapter or a checkpoint, and PEFT's two files do not say.
NOTES_FILE = "stoker.json"


def read_object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in `path`; `missing` if there is no such file. Raises `ModelError` that names the file."""
    content = read_json(path, missing)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: {as_json(content)}, not a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder. Raises `ModelError` if it is none, or if its `model_type` is no text."""
    config: dict[str, Any] = _with_floats(read_object(folder / "config.json"))
    architecture = config.get("model_type")
    if not isinstance(architecture, str | None):
        raise ModelError(f"{folder / 'config.json'}: model_type is {as_json(architecture)}, not a text")
    return config


def _with_floats(value: Any) -> Any:
    """With the numbers that JSON has not, as transformers 5 spells them: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        named = value.get(_FLOAT) if len(value) == 1 else None
        if isinstance(named, str) and named in _FLOATS:
            return _FLOATS[named]
        return {name: _with_floats(part) for name, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


def read_json(path: Path, missing: Any = None) -> Any:
    """The same for any JSON."""
    if missing is not None and not os.path.lexists(path):
        return missing
    content = read_bytes(path, MAX_BYTES)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from error
    check_depth(path, value)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ModelError(f"{path}: a text in it holds half a surrogate pair, which is no text") from None
    return value


def check_depth(path: Path, value: Any) -> None:
    """Raises `ModelError` for what lies deeper in one another than any file does: readers of it would recurse."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise ModelError(f"{path}: objects and lists in one another, more than {MAX_DEPTH} deep")


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes. Raises `ModelError` that names it."""
    try:
        with open_file(path) as file:
            content = file.read(most + 1)
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent}: no {path.name} in it") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise ModelError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if len(content) > most:
        raise ModelError(f"{path}: more than {most} bytes, the most that are read")
    return content


def open_file(path: Path) -> BinaryIO:
    """`path`, open for reading. Raises `OSError`, and `ModelError` for what is no file: a pipe or a device would never
    end, or never begin."""
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ModelError(f"{path}: neither a file nor a link to one, and only those are read")


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write `fields` to `path`, whole or not at all. Raises `OSError`."""
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))
