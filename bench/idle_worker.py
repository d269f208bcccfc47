"""A real worker whose engine does nothing: what is left is the queue. `celery -A bench.idle_worker worker …`."""

from __future__ import annotations

from bench.idle_engine import IdleEngine
from workers.celery.app import app

__all__ = ["app"]

app.context.make_engine = lambda settings, publish, on_death: IdleEngine(publish)
