"""kombu's Redis transports for a process that only watches: it takes no messages, and gives none back to their queues.

kombu has every process that listens look for messages whose worker went silent. Workers do that by their leases; a
monitor's user in the broker has no right to, and the refusal would end its listening again and again.
"""

from __future__ import annotations

import kombu.transport
import kombu.transport.redis as kombu_redis


class QoS(kombu_redis.QoS):
    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:
        pass


class Channel(kombu_redis.Channel):
    QoS = QoS


class Transport(kombu_redis.Transport):
    Channel = Channel


class SentinelChannel(kombu_redis.SentinelChannel):
    QoS = QoS


class SentinelTransport(kombu_redis.SentinelTransport):
    Channel = SentinelChannel


def install() -> None:
    """For every URL that `Address` has."""
    for scheme, transport in (("redis", Transport), ("rediss", Transport), ("sentinel", SentinelTransport)):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{transport.__name__}"
