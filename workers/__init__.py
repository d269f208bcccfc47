"""The worker process: Celery app, boot, lanes, leases, publishing, cancelling, presence."""
