"""A broker whose clock a test sets: quick (a socket of its own, nothing on disk), and a real one all the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import redis
from redis.exceptions import RedisError

from stoker.broker import keys, ledger
from stoker.broker.functions import Functions
from stoker.broker.ledger.transitions import made
from stoker.local.broker import server_binary
from tests.conftest import wait_until

CLOCK = "clock"
ASKS_THE_TIME = "redis.call('TIME')"
#: Takes from every key that expires what has passed, so that the broker's own clock counts for nothing.
AGE = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 and string.sub(key, 1, #ARGV[2]) ~= ARGV[2] then redis.call('PEXPIRE', key, left - tonumber(ARGV[1])) end
end
"""


@contextmanager
def quick_broker(folder: Path, *more: str) -> Iterator[Any]:
    """A server that keeps nothing, and a client of it."""
    socket = folder / "broker.sock"
    options = {"port": 0, "unixsocket": socket, "save": "", "appendonly": "no", "dir": folder}
    command = [str(server_binary()), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    client: Any = redis.Redis(unix_socket_path=str(socket))
    with started([*command, *more], client):
        yield client


@contextmanager
def started(command: list[str], client: Any) -> Iterator[None]:
    """A server that answers `client`; inside it runs."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(client), "the broker answers")
        yield
    finally:
        client.close()
        server.terminate()
        server.wait(30)


def _answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


def _with_clock(text: str) -> str:
    assert text.count(ASKS_THE_TIME) <= 1
    return text.replace(ASKS_THE_TIME, f"redis.call('LRANGE', '{CLOCK}', 0, 1)")


@contextmanager
def set_clock(client: Any) -> Iterator[None]:
    """The ledger's transitions, functions of the broker of this client, read `CLOCK` instead of its time; nothing else
    of them changes."""
    library, transitions = made(_with_clock)
    assert library.text.count(f"'{CLOCK}'") == 1
    client.functions = Functions(loads=True)
    with patch.object(ledger, "TRANSITIONS", transitions):
        yield
    assert client.functions.called(), "no call was a script's"


def give_time(client: Any, now: float, passed: float = 0.0) -> None:
    """It is `now`, and `passed` seconds later than before; the presences of workers are renewed meanwhile."""
    pipeline = client.pipeline()
    pipeline.delete(CLOCK)
    pipeline.rpush(CLOCK, int(now), int(now % 1 * 1e6))
    if passed:
        pipeline.eval(AGE, 0, int(passed * 1000), keys.worker(""))
    pipeline.execute()
