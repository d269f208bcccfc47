"""What a day of embedding leaves in the broker: memory and the append-only file, with 170,000 texts in jobs of 100,
each of which a client fetches once. Kept for a day, as it was; kept for ten minutes from the fetch, as it is; taken out
by the client, as `embed_many` does.

The vectors are written by the worker's own call, without a model. A day lasts as long as the broker needs: what would
expire within it is made to expire after as many jobs as come in its time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report import Row, row, write
from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.broker.ledger import discarding, vectors
from stoker.local.broker import EmbeddedBroker
from stoker.settings import load_settings

TEXTS, OF_A_JOB, DIM = int(os.environ.get("TEXTS", "170000")), 100, 384
JOBS = TEXTS // OF_A_JOB
#: Jobs that come in the time for which vectors are kept once they were fetched.
MEANWHILE = JOBS * keys.FETCHED_TTL // (24 * 3600) + 1


def kept_for_a_day(redis: Any, number: int, data: bytes) -> None:
    redis.set(keys.blob(f"vectors:{number}"), data, ex=keys.RESULT_TTL)
    redis.get(keys.blob(f"vectors:{number}"))


def kept_for_minutes(redis: Any, number: int, data: bytes) -> None:
    vectors.keep(redis, str(number), data)
    vectors.fetch(str(number), 30.0).on(redis)
    gone = str(number - MEANWHILE)
    if redis.pexpire(keys.blob(f"vectors:{gone}"), 1):
        redis.zadd(keys.VECTORS_FETCHED, {gone: 1.0})


def taken_out(redis: Any, number: int, data: bytes) -> None:
    vectors.keep(redis, str(number), data)
    vectors.fetch(str(number), 30.0).on(redis)
    discarding.discard(str(number)).on(redis)


def day(name: str, job: Callable[[Any, int, bytes], None]) -> list[Row]:
    with tempfile.TemporaryDirectory() as home:
        broker = EmbeddedBroker(load_settings(home=Path(home)), port=0)
        redis = connect(load_settings(url=broker.start()))
        try:
            largest = 0
            for number in range(JOBS):
                job(redis, number, os.urandom(OF_A_JOB * DIM * 4))
                largest = max(largest, _disk(Path(home))) if number % 20 == 0 else largest
            broker.compact()
            while redis.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.1)
            memory, disk = redis.info("memory")["used_memory"], _disk(Path(home))
        finally:
            redis.close()
            broker.stop()
    what = (("memory at the end", memory), ("disk at the end", disk), ("disk at most", largest))
    return [row(f"{name}: {text}", "MB", [count / 1e6]) for text, count in what]


def _disk(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "broker" / "appendonlydir").iterdir())


def main() -> None:
    days = {"kept a day": kept_for_a_day, "kept 10 minutes": kept_for_minutes, "taken out": taken_out}
    print(f"{JOBS} jobs of {OF_A_JOB} texts, {DIM} numbers each")
    write("growth", [found for name, job in days.items() for found in day(name, job)])


if __name__ == "__main__":
    main()
