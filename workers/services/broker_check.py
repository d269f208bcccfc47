"""A broker that drops keys to make room would lose jobs without a word: a worker does not start on one."""

from __future__ import annotations

import logging
from typing import Any

from redis.exceptions import AuthenticationError, RedisError

from stoker.broker.connection import connect, translated
from stoker.errors import ConfigError
from stoker.settings import Settings

log = logging.getLogger(__name__)

#: The part of `maxmemory` from which on it is worth a warning.
NEARLY_FULL = 0.9


def check_broker(settings: Settings) -> None:
    """Raises `ConfigError` for an eviction policy that loses jobs, and `BrokerUnavailable` for a login that is refused.

    A broker that is away is none of its business: a worker waits for it.
    """
    redis = connect(settings)
    try:
        memory = redis.info("memory")
    except AuthenticationError:
        with translated(settings):
            raise
    except RedisError as error:
        log.warning("the broker's memory settings are unknown: %s", error)
        return
    finally:
        redis.close()
    problem = evicts(memory)
    if problem:
        raise ConfigError(f"the broker at {settings.address.shown} {problem}")


def evicts(memory: dict[str, Any]) -> str:
    """What is wrong with the policy that `INFO memory` names, and the remedy; empty if it keeps every key."""
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return ""
    return (
        f"has maxmemory-policy {policy}: when its memory is full it would drop jobs. Set `maxmemory-policy noeviction` "
        "in its configuration, or now by `redis-cli CONFIG SET maxmemory-policy noeviction`."
    )


def warn_of(memory: dict[str, Any]) -> None:
    """Log what went wrong with a broker after this worker had started."""
    problem = evicts(memory)
    if problem:
        log.error("the broker %s", problem)
    most = memory.get("maxmemory", 0)
    if most and memory["used_memory"] > NEARLY_FULL * most:
        log.warning("the broker uses %d of %d bytes: when it is full, nothing is accepted", memory["used_memory"], most)
