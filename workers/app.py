"""The old path of `workers.celery.app`, which people's scripts name: `celery -A workers.app`. It goes with 1.0."""

from workers.celery.app import app

__all__ = ["app"]
