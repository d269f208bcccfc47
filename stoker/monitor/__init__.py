"""The monitor: Flower with every job in it, and Stoker's own page. `stoker flower` runs it.

Flower stays as it is: handlers and a page are added (`app.py`), a few lines of its templates change as they are loaded
(`templating.py`), and its memory of tasks learns from the ledger what Celery's events do not say (`state.py`).
"""
