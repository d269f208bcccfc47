"""Reading what a client uploaded: the whole of it, or an error that says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stoker.broker import keys
from stoker.contract.uploads import Upload, UploadCheck


def parts(redis: Any, upload: Upload) -> Iterator[bytes]:
    """An upload part by part. Raises `JobLost` behind the last one if they are not what was sent."""
    check, blob = UploadCheck(upload), keys.blob(str(upload))
    # Ask for one byte behind the end too: if there is one, the upload is not what was sent.
    for start in range(0, upload.size + 1, keys.PART):
        part = check.add(redis.getrange(blob, start, start + keys.PART - 1))
        yield part
        if len(part) < keys.PART:
            # The name may promise a terabyte.
            break
    check.end()


def read(redis: Any, upload: Upload) -> bytes | None:
    """An upload in one piece; None if it has expired."""
    if not redis.exists(keys.blob(str(upload))):
        return None
    return b"".join(parts(redis, upload))
