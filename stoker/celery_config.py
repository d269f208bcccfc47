"""The part of Celery's configuration on which clients and workers must agree."""

from __future__ import annotations

from typing import Any

from stoker.broker import keys
from stoker.broker.connection import SOCKET_TIMEOUT
from stoker.settings import Settings


def shared_config(settings: Settings) -> dict[str, Any]:
    """JSON only, all keys under `stoker:`. One list a queue: the ledger puts jobs in order, priorities included."""
    through = _through_sentinels(settings)
    return {
        "broker_url": settings.address.celery,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "global_keyprefix": keys.PREFIX,
            "priority_steps": [0],
            "socket_keepalive": True,
            # Longer than any command that blocks on purpose (BRPOP: 1 s): a frozen broker must not freeze the worker.
            "socket_timeout": SOCKET_TIMEOUT,
            "socket_connect_timeout": SOCKET_TIMEOUT,
            **through,
        },
        "result_backend_transport_options": {"global_keyprefix": keys.PREFIX, **through},
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_default_priority": 0,
    }


def _through_sentinels(settings: Settings) -> dict[str, Any]:
    """What kombu and Celery's result backend need in addition to the URL of the sentinels."""
    sentinels = settings.address.sentinels
    if sentinels is None:
        return {}
    from stoker.broker.sentinel import login

    return {"master_name": sentinels.service, "sentinel_kwargs": login(sentinels)}
