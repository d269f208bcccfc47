"""What publishing, reading and idling cost one broker, by the CPU time of its process: `python -m bench.scale_costs`.

A broker of its own; what is asked of it takes turns. `bench/scale.py` computes and simulates with these rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.idle_models import MODEL, token
from bench.queue import Bench
from bench.report import Row, parser, row, write
from stoker import Client
from stoker.broker import keys
from stoker.broker.connection import connect
from workers.services.publishing import Publisher

ROUNDS = 5
#: Rows of a worker that decodes, and steps of a round at so many rows.
ROWS, STEPS = (1, 32, 128), {1: 2000, 32: 200, 128: 60}
SECONDS = 10.0
#: Who follows each stream, in the round with readers: over a connection of its own, as the clients do.
READERS = 2
#: Jobs that are sent at once, the steps a second of the engine that makes them, and streams that run and wait.
JOBS, SMALL_RATE, RUNNING = 200, 60.0, 64


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
    rows, more, sent, came, kept = 32, [], [], [], []
    with publisher(bench) as made, closing(connect(bench.settings)) as redis:
        for turn in range(ROUNDS):
            tokens = rows * STEPS[rows]
            alone = broker.cost(partial(publish, made, f"a{turn}", rows))
            subscriptions = [redis.pubsub() for _ in range(READERS * rows)]
            for number, subscription in enumerate(subscriptions):
                subscription.subscribe(keys.channel(f"r{turn}-{number % rows}"))
                subscription.get_message(timeout=5)
            before = broker.net()
            heard = broker.cost(partial(publish, made, f"r{turn}", rows))
            after = broker.net()
            more.append((heard - alone) / (tokens * READERS))
            came.append((after[0] - before[0]) / tokens)
            sent.append((after[1] - before[1]) / (tokens * READERS))
            kept.append(redis.memory_usage(keys.stream(f"a{turn}-0"), samples=0) / STEPS[rows])
            for subscription in subscriptions:
                subscription.close()
            broker.redis.flushall()
    return [
        row("a token to one more reader", "us", more),
        row("a token from its worker", "bytes", came),
        row("a token to a reader", "bytes", sent),
        row("a token that is kept", "bytes", kept),
    ]


def idling(bench: Bench, broker: Broker) -> list[Row]:
    """A second of a worker that has nothing to do: its lanes' questions, its presence, what it counts."""

    def rest() -> None:
        time.sleep(SECONDS)

    nobody = broker.cost(rest) / SECONDS
    with bench.worker():
        rest()
        samples = [broker.cost(rest) / SECONDS - nobody for _ in range(3)]
    return [row("a second of an idle worker", "us", samples)]


def jobs(bench: Bench, broker: Broker) -> list[Row]:
    """A whole job of two tokens, with all that its client, Celery and its worker ask; and a second of a stream that
    runs and makes nothing: its lease, and whether it was cancelled."""
    samples = []
    with Client(settings=bench.settings) as client:
        with bench.worker(rate=SMALL_RATE):
            for turn in range(ROUNDS + 1):
                spent = broker.cost(lambda: batch(client)) / JOBS
                samples += [spent] if turn else []
        with bench.worker(generate_slots=RUNNING):
            quiet = broker.cost(lambda: time.sleep(SECONDS)) / SECONDS
            running = [client.generate("x", model=MODEL, max_tokens=100, top_k=1000) for _ in range(RUNNING)]
            while any(not job.get("worker") for job in client.jobs().values()):
                time.sleep(0.1)
            busy = [broker.cost(lambda: time.sleep(SECONDS)) / SECONDS for _ in range(3)]
            for job in running:
                job.cancel()
    return [
        row("a job of two tokens, whole", "us", samples),
        row("a second of a running stream", "us", [(spent - quiet) / RUNNING for spent in busy]),
    ]


def batch(client: Client) -> None:
    for job in [client.generate("x", model=MODEL, max_tokens=2) for _ in range(JOBS)]:
        job.result(60)


def main() -> None:
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        try:
            with closing(connect(bench.settings)) as redis:
                broker = Broker(redis)
                rows = [*publishing(bench, broker), *reading(bench, broker), *idling(bench, broker)]
                rows += jobs(bench, broker)
        finally:
            bench.close()
    write("scale-costs", rows, options.out)


if __name__ == "__main__":
    main()
