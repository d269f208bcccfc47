"""A worker does not start on a broker that would lose its jobs, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from stoker.broker.connection import connect
from stoker.errors import BrokerUnavailable, ConfigError
from stoker.settings import Settings
from tests.closing import noting_closes
from workers.services.broker_check import check_broker, warn_of


def test_a_broker_that_keeps_every_key_is_good(broker: Settings) -> None:
    check_broker(broker)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_broker_that_evicts_is_refused_with_the_remedy(broker: Settings, policy: str) -> None:
    redis = connect(broker)
    redis.config_set("maxmemory-policy", policy)
    try:
        with pytest.raises(ConfigError, match=rf"maxmemory-policy {policy}.*CONFIG SET maxmemory-policy noeviction"):
            check_broker(broker)
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
        redis.close()


def test_a_login_that_is_refused_is_distinguished_from_a_broker_that_is_away(broker: Settings) -> None:
    wrong = broker.model_copy(update={"url": broker.address.redis.replace("://", "://user:wrong@")})
    with pytest.raises(BrokerUnavailable, match=r"refuses the login.*Put its user and password") as refused:
        check_broker(wrong)
    assert "wrong@" not in str(refused.value)
    check_broker(broker.model_copy(update={"url": "redis://127.0.0.1:1/0"}))


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"maxmemory": 100, "used_memory": 89}, []),
        ({"maxmemory": 100, "used_memory": 91}, [("WARNING", "the broker uses 91 of 100 bytes")]),
        ({"maxmemory": 0, "used_memory": 1 << 40}, []),
        ({"used_memory": 1}, []),
        (
            {"maxmemory": 100, "used_memory": 99, "maxmemory_policy": "allkeys-lru"},
            [("ERROR", "the broker has maxmemory-policy all"), ("WARNING", "the broker uses 99 of 100 bytes")],
        ),
    ],
)
def test_a_broker_that_fills_or_begins_to_evict_is_warned_of(
    memory: dict[str, Any], said: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of(memory)
    assert [record.levelname for record in caplog.records] == [level for level, _ in said]
    for record, (_, begin) in zip(caplog.records, said, strict=True):
        assert record.getMessage().startswith(begin)


@pytest.mark.parametrize("url", ["", "redis://127.0.0.1:1/0"], ids=["there", "away"])
def test_the_connection_of_the_check_is_closed(broker: Settings, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    closed = noting_closes(monkeypatch, "workers.services.broker_check.connect")
    check_broker(broker.model_copy(update={"url": url}) if url else broker)
    assert len(closed) == 1
