"""The worker's app with an engine whose embedding steps never end while the file that $HANG_WHILE names is there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from stoker.settings import Settings
from workers.celery.app import app
from workers.context import MakeEngine

if TYPE_CHECKING:
    from engine.embedding.lane import EmbedLane
    from engine.engine import Engine
    from engine.ticket import StepOutput

__all__ = ["app"]

make_engine: MakeEngine = app.context.make_engine


def make_hanging_engine(settings: Settings, publish: Callable[..., None], on_death: Callable[[], None]) -> Engine:
    engine = make_engine(settings, publish, on_death)
    # Only now: importing it imports MLX, which has to find its BLAS.
    from engine.embedding.lane import EmbedLane

    run = EmbedLane.run

    def hang(lane: EmbedLane, *, lookahead: bool = True) -> StepOutput:
        if Path(os.environ["HANG_WHILE"]).exists():
            threading.Event().wait()
        return run(lane, lookahead=lookahead)

    mock.patch.object(EmbedLane, "run", hang).start()
    return engine


app.context.make_engine = make_hanging_engine
