"""A rank behind the first one, as if that were on another host: its connection goes through a cable of the test, whose
port is `CABLE`, and it cannot kill rank 0."""

from __future__ import annotations

import os
import socket
from unittest.mock import patch

from tests.integration.cable import through_cable
from workers import rank
from workers.group.meeting import Address


def _connect(address: Address) -> socket.socket:
    return through_cable(int(os.environ["CABLE"]), address.port)


def _kill(address: Address) -> None: ...


if __name__ == "__main__":
    with patch.object(Address, "connect", _connect), patch.object(Address, "kill", _kill):
        rank.main()
