"""Files of vectors, opened as `stoker embed` opens them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from stoker.files import output
from stoker.files.vector_output import VectorOutput


def opened(
    path: Path, rows: int, job: Mapping[str, Any], overwrite: bool = False
) -> AbstractContextManager[VectorOutput]:
    return output.opened(VectorOutput(path, rows, job), overwrite)
