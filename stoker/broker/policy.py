"""What an operator decides for all clients of a broker: how much may wait, how fast waiting lifts a job.

It lies in the broker and not in a setting, because the ledger's scripts apply it to every client alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from stoker.broker import keys, ledger
from stoker.broker.ledger.vectors import VECTOR_BYTES
from stoker.contract import names
from stoker.errors import InvalidRequest


@dataclass(frozen=True)
class PolicyRule:
    default: int
    most: int
    says: str
    least: int = 1


RULES = {
    "queue_limit": PolicyRule(ledger.QUEUE_LIMIT, 1_000_000, "jobs that may wait in one queue"),
    "client_limit": PolicyRule(ledger.CLIENT_LIMIT, 1_000_000, "open jobs that one client may have in one queue"),
    "queue_bytes": PolicyRule(
        ledger.QUEUE_BYTES, 2**40, "bytes that the open jobs of one queue may have, with their inputs"
    ),
    "vector_bytes": PolicyRule(
        VECTOR_BYTES, 2**40, "bytes that the vectors of all jobs may have until they are fetched"
    ),
    "result_seconds": PolicyRule(
        keys.RESULT_TTL, keys.RESULT_TTL, "seconds that results are kept from their job's end, with its stream", 60
    ),
    "crashes": PolicyRule(ledger.MAX_CRASHES, 1000, "workers that a job may crash before it is dead-lettered"),
    "ageing": PolicyRule(ledger.AGEING, 30 * 24 * 3600, "seconds of waiting that lift a job by one priority"),
}
#: The limit of one client: this, and its key.
OF_CLIENT = "client_limit:"


def read(redis: Any) -> dict[str, int]:
    """Every rule, and every client with a limit of its own; not what `decide` never wrote. For a blocking client."""
    raw = {name.decode(errors="replace"): value for name, value in redis.hgetall(keys.POLICY).items()}
    decided = {name: int(value) for name, value in raw.items() if re.fullmatch(rb"[1-9][0-9]{0,12}", value)}
    known = {
        name: value for name, value in decided.items() if (rule := _named(name)) and rule.least <= value <= rule.most
    }
    return {name: rule.default for name, rule in RULES.items()} | known


def decide(redis: Any, name: str, value: int | None) -> None:
    """Set one rule; None: back to the default. Raises `InvalidRequest`. For a blocking client."""
    rule = _rule(name)
    if value is None:
        redis.hdel(keys.POLICY, name)
        return
    if not rule.least <= value <= rule.most:
        raise InvalidRequest(f"{name}: {value} given; allowed: {rule.least} to {rule.most}.")
    redis.hset(keys.POLICY, name, value)


def _rule(name: str) -> PolicyRule:
    rule = _named(name)
    if rule is None:
        raise InvalidRequest(f"policy: {name!r} given; allowed: {', '.join(RULES)}, {OF_CLIENT}KEY.")
    return rule


def _named(name: str) -> PolicyRule | None:
    client = name.removeprefix(OF_CLIENT)
    if client != name and names.follows(names.Rule.NAME, client):
        return RULES["client_limit"]
    return RULES.get(name)
