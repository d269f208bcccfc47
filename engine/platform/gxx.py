"""g++, which compiles for Linux CPUs on the machine itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

#: Seconds that one run has; the longest takes four.
PATIENCE = 120.0
#: What `compile` raises.
ERRORS = (OSError, subprocess.SubprocessError)


def found() -> Path | None:
    """The g++ that is run, where there is one."""
    path = shutil.which("g++")
    return None if path is None else Path(path)


def compile(compiler: Path, words: Sequence[str], target: Path) -> None:
    """Compile what `words` say into the file `target`. Raises `ERRORS`."""
    subprocess.run([compiler, *words, "-o", target], check=True, capture_output=True, timeout=PATIENCE)
