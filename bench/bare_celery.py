"""Celery alone, as its own documentation sets it up: the peer of bench/queue.py."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("bare", broker=os.environ["BARE_URL"], backend=os.environ["BARE_URL"])
app.conf.worker_hijack_root_logger = False


@app.task(name="bare.nothing")
def nothing(payload: dict[str, object]) -> dict[str, object]:
    return payload
