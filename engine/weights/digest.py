"""A short name for the contents of a model's weight files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.weights.gguf_parts import parts

#: Bytes at each end of a file that are looked at: headers, which name every tensor, and the last tensors' numbers.
_END = 1 << 20


def weights_digest(path: Path) -> str:
    """Of a file with its further parts, or of a folder's safetensors and config.json: equal for copies, different for
    another model or another training of the same one. Reads a megabyte at each end of a file, so that it takes
    milliseconds."""
    files = parts(path) if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
    files = [file for file in files if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.suffix} {size}\n".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_END))
            content.seek(max(0, size - _END))
            digest.update(content.read(_END))
    return digest.hexdigest()[:16]
