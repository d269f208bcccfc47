"""The JSON files that lie beside weights: read within a limit, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoker.errors import ModelError
from stoker.files import write_whole

#: A configuration is a few hundred bytes; a tokenizer's, which lists its special tokens, up to 2 MB.
MAX_BYTES = 16 << 20


def read_object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in `path`; `missing` if there is no such file. Raises `ModelError` that names the file."""
    content = read_json(path, missing)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a {type(content).__name__}, not a JSON object")
    return content


def read_json(path: Path, missing: Any = None) -> Any:
    """The same for any JSON."""
    if missing is not None and not path.is_file():
        return missing
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ModelError(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent}: no {path.name} in it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from error


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write `fields` to `path`, whole or not at all. Raises `OSError`."""
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))
