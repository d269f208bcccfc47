"""A process that only watches takes no message back, by any way in which it reaches the broker."""

from __future__ import annotations

from typing import Any

import kombu.transport
import pytest
from kombu.transport import get_transport_cls
from kombu.transport import redis as kombu_redis

from stoker.monitor import transport


@pytest.mark.parametrize("scheme", ["redis", "rediss", "sentinel"])
def test_no_message_is_given_back_over_any_kind_of_address(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu_redis.QoS, "restore_visible", lambda *_, **__: pytest.fail("it looks for messages"))
    transport.install()
    used: Any = get_transport_cls(scheme)
    theirs = kombu_redis.SentinelTransport if scheme == "sentinel" else kombu_redis.Transport
    assert issubclass(used, theirs)
    assert issubclass(used.Channel, theirs.Channel)
    assert used.Channel.QoS.restore_visible(None) is None
