"""What the process that computes takes from its surroundings: the engine and the kernels read no environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stoker.settings import Settings

if TYPE_CHECKING:
    from engine.platform.blas import BlasReport


def boot_blas(settings: Settings) -> BlasReport:
    """Call it before anything imports MLX, which binds to the BLAS that it finds."""
    from engine.platform import blas

    return blas.boot(asked_cores(), cache=settings.home / "cache", library=settings.blas or "")


def asked_cores() -> int | None:
    """The cores that `OPENBLAS_NUM_THREADS`, OpenBLAS's own variable, asks for; None: it says nothing."""
    said = os.environ.get("OPENBLAS_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else None
