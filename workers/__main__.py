"""Celery's command as a worker is started: `python -m workers -A workers.celery.app worker …`."""

from __future__ import annotations

from stoker.local.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from stoker.logs.setup import configure
    from stoker.settings import load_settings

    # Before Celery says its first word, which is a warning.
    configure(load_settings())
    from celery.__main__ import main

    main()
