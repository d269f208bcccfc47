"""What publishing, reading and idling cost one broker, by the CPU time of its process: `python -m bench.scale_costs`.

A broker of its own; what is asked of it takes turns. `bench/scale.py` computes and simulates with these rows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.idle_models import MODEL, token
from bench.queue import Bench
from bench.report import Record, Row, parser, row
from stoker import Client
from stoker.broker import keys
from stoker.broker.connection import connect
from workers.services.publishing import Publisher

ROUNDS = 5
#: Rows of a worker that decodes, and steps of a round at so many rows.
ROWS, STEPS = (1, 32, 128), {1: 2000, 32: 200, 128: 60}
SECONDS, QUIET = 10.0, 4.0
#: Who follows each stream, in the round with readers: over a connection of its own, as the clients do.
READERS = 2
#: Jobs that are sent at once, the steps a second of the engine that makes them, and streams that run and wait.
JOBS, SMALL_RATE, RUNNING = 200, 60.0, 256
#: Workers that idle at once: one asks for less than what the broker does by itself, which is never twice the same.
IDLE = 4
#: Turns of what is measured for `SECONDS`, with it and without.
TURNS = 3


class Broker:
    """Its process: CPU time, bytes on the network."""

    def __init__(self, redis: Any) -> None:
        self.redis = redis

    def used(self) -> float:
        """Microseconds of the CPU since it started."""
        cpu = self.redis.info("cpu")
        return 1e6 * float(cpu["used_cpu_sys"] + cpu["used_cpu_user"])

    def net(self) -> tuple[int, int]:
        stats = self.redis.info("stats")
        return int(stats["total_net_input_bytes"]), int(stats["total_net_output_bytes"])

    def cost(self, action: Callable[[], object]) -> float:
        before = self.used()
        action()
        return self.used() - before

    def second(self) -> float:
        """What it takes, once all that has begun or ended is quiet."""
        time.sleep(QUIET)
        return self.cost(lambda: time.sleep(SECONDS)) / SECONDS


def added(without: Sequence[float], within: Sequence[float], many: int) -> list[float]:
    """What each of `many` adds, by turns. Raises `ValueError` where that is lost in what the broker does otherwise: a
    row would say that it takes nothing, or gives some back."""
    found = [(more - less) / many for less, more in zip(without, within, strict=True)]
    if min(found) <= 0:
        raise ValueError(f"not said: without it {without} us, with {many} of it {within} us.")
    return found


@contextmanager
def publisher(bench: Bench) -> Iterator[Publisher]:
    made = Publisher(connect(bench.settings))
    made.start()
    try:
        yield made
    finally:
        made.stop()


def publish(made: Publisher, name: str, rows: int) -> None:
    """The steps of a round, one at a time, as a worker has them."""
    jobs = [f"{name}-{stream}" for stream in range(rows)]
    for step in range(STEPS[rows]):
        made.publish([(job, token(step, step + 1 == STEPS[rows])) for job in jobs])
        made.flush(jobs[0])


def publishing(bench: Bench, broker: Broker) -> list[Row]:
    """A step's script, by how many tokens it carries."""
    found: dict[int, list[float]] = {rows: [] for rows in ROWS}
    with publisher(bench) as made:
        for turn in range(ROUNDS + 1):
            for rows in ROWS:
                spent = broker.cost(partial(publish, made, f"p{turn}-{rows}", rows)) / STEPS[rows]
                # The first round sends the script.
                found[rows] += [spent] if turn else []
            broker.redis.flushall()
    return [row(f"publishing a step of {rows} tokens", "us", found[rows]) for rows in ROWS]


def reading(bench: Bench, broker: Broker) -> list[Row]:
    """What a token costs more for each reader that it is sent to, and its bytes on the network and in memory."""
    rows, without, within, sent, came, kept = 32, [], [], [], [], []
    with publisher(bench) as made, closing(connect(bench.settings)) as redis:
        for turn in range(ROUNDS):
            tokens = rows * STEPS[rows]
            without.append(broker.cost(partial(publish, made, f"a{turn}", rows)))
            subscriptions = [redis.pubsub() for _ in range(READERS * rows)]
            for number, subscription in enumerate(subscriptions):
                subscription.subscribe(keys.channel(f"r{turn}-{number % rows}"))
                subscription.get_message(timeout=5)
            before = broker.net()
            within.append(broker.cost(partial(publish, made, f"r{turn}", rows)))
            after = broker.net()
            came.append((after[0] - before[0]) / tokens)
            sent.append((after[1] - before[1]) / (tokens * READERS))
            kept.append(redis.memory_usage(keys.stream(f"a{turn}-0"), samples=0) / STEPS[rows])
            for subscription in subscriptions:
                subscription.close()
            broker.redis.flushall()
    return [
        row("a token to one more reader", "us", added(without, within, tokens * READERS)),
        row("a token from its worker", "bytes", came),
        row("a token to a reader", "bytes", sent),
        row("a token that is kept", "bytes", kept),
    ]


def idling(bench: Bench, broker: Broker) -> list[Row]:
    """A second of a worker that has nothing to do: its lanes' questions, its presence, what it counts."""
    without, within = [], []
    for _ in range(TURNS):
        without.append(broker.second())
        with ExitStack() as workers:
            for _ in range(IDLE):
                workers.enter_context(bench.worker())
            within.append(broker.second())
    return [row("a second of an idle worker", "us", added(without, within, IDLE))]


def jobs(bench: Bench, broker: Broker) -> list[Row]:
    """A whole job of two tokens, with all that its client, Celery and its worker ask."""
    samples = []
    with Client(settings=bench.settings) as client, bench.worker(rate=SMALL_RATE):
        for turn in range(ROUNDS + 1):
            spent = broker.cost(lambda: batch(client)) / JOBS
            samples += [spent] if turn else []
    return [row("a job of two tokens, whole", "us", samples)]


def running(bench: Bench, broker: Broker) -> list[Row]:
    """A second of a stream that runs and makes nothing: its lease, and whether it was cancelled."""
    without, within = [], []
    with Client(settings=bench.settings) as client, bench.worker(generate_slots=RUNNING):
        for _ in range(TURNS):
            without.append(broker.second())
            streams = [client.generate("x", model=MODEL, max_tokens=100, top_k=1000) for _ in range(RUNNING)]
            while any(not job.get("worker") for job in client.jobs().values()):
                time.sleep(0.1)
            within.append(broker.second())
            for job in streams:
                job.cancel()
            while client.jobs():
                time.sleep(0.1)
    return [row("a second of a running stream", "us", added(without, within, RUNNING))]


def batch(client: Client) -> None:
    for job in [client.generate("x", model=MODEL, max_tokens=2) for _ in range(JOBS)]:
        job.result(60)


def main() -> int:
    options = parser(__doc__).parse_args()
    record = Record("scale-costs", options.out)
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        try:
            with closing(connect(bench.settings)) as redis:
                broker = Broker(redis)
                for part in (publishing, reading, idling, jobs, running):
                    record.part(part.__name__, partial(part, bench, broker))
        finally:
            bench.close()
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
