"""Brokers that read their data back so slowly that a test can look at them meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from stoker.local.broker import EmbeddedBroker
from tests.conftest import PATIENCE, wait_until

KEYS = 4000
#: Microseconds for each key: all of them would take twenty seconds. A client has its answer after one or two of them.
LONG = 5_000


class SlowBroker(EmbeddedBroker):
    """An embedded broker that takes `delay` microseconds for each key that it loads."""

    delay = 0

    def _options(self, port: int) -> list[str]:
        # Clients are answered after each KB that was read, instead of each 2 MB.
        slow = ["--key-load-delay", str(self.delay), "--loading-process-events-interval-bytes", "1024"]
        return [*super()._options(port), "--enable-debug-command", "yes", *slow]


def value(number: int) -> bytes:
    """What a key holds: about as much as is read between two answers, and nothing that the broker could press."""
    return random.Random(number).randbytes(1000)


def fill(url: str) -> None:
    """Put some keys there, which expire."""
    with redis.Redis.from_url(url) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(KEYS):
            pipeline.set(f"stoker:blob:vectors:{number}", value(number), ex=3600)
        pipeline.execute()
        # As a snapshot: of an append-only file a broker reads a thousand commands before it answers at all.
        rewrite(client)


def rewrite(client: redis.Redis, seconds: float = PATIENCE) -> None:
    """Have the broker write its append-only file anew, as a snapshot. It does so by itself no more: what comes later
    stays behind the snapshot."""
    # The broker refuses where it has just begun by itself, as it does once the file has grown much.
    client.config_set("auto-aof-rewrite-percentage", 0)
    wait_until(lambda: not _rewrites(client), "the broker's own rewriting has ended", seconds)
    client.bgrewriteaof()
    wait_until(lambda: not _rewrites(client), "the append-only file is rewritten", seconds)
    assert client.info("persistence")["aof_last_bgrewrite_status"] == "ok"


def _rewrites(client: redis.Redis) -> bool:
    info = client.info("persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


class Load:
    """Of a broker that reads its data back: it goes on until `end`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = self._refusals()

    def await_refusal(self) -> None:
        """Until a command was answered that the broker loads."""
        wait_until(lambda: self._refusals() > self._before, "a command has met the load")

    def _refusals(self) -> int:
        with redis.Redis.from_url(self._url) as client:
            return int(client.info("errorstats").get("errorstat_LOADING", {}).get("count", 0))

    def end(self) -> None:
        """The rest of it takes no time."""
        with redis.Redis.from_url(self._url) as client:
            client.config_set("key-load-delay", 0)


@contextmanager
def loading(url: str) -> Iterator[Load]:
    """The broker drops its data and reads it back, at the latest until the end of the block. Inside it has begun to."""

    def reload() -> None:
        with redis.Redis.from_url(url, socket_timeout=60) as client:
            client.config_set("key-load-delay", LONG)
            client.execute_command("DEBUG", "RELOAD")

    thread, load = threading.Thread(target=reload), Load(url)
    with redis.Redis.from_url(url) as client:
        thread.start()
        wait_until(lambda: client.info("persistence")["loading"], "the broker loads")
    try:
        yield load
    finally:
        load.end()
        thread.join()
