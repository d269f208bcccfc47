"""The worker's app with an engine whose embedding steps never end while the file that $HANG_WHILE names is there."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from workers.celery import boot
from workers.celery.app import app

__all__ = ["app"]

_make_engine = boot._make_engine


def _make_hanging_engine(*arguments: Any) -> Any:
    engine = _make_engine(*arguments)
    # Only now: importing it imports MLX, which has to find its BLAS.
    from engine.embedding.lane import EmbedLane

    run = EmbedLane.run

    def hang(lane: EmbedLane) -> Any:
        if Path(os.environ["HANG_WHILE"]).exists():
            threading.Event().wait()
        return run(lane)

    EmbedLane.run = hang  # type: ignore[method-assign]
    return engine


boot._make_engine = _make_hanging_engine
