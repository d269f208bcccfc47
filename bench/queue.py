"""What the queue costs and bears. A broker and workers of its own; the engine does nothing.

`python -m bench.queue transitions backlog`: these parts alone. The quick form leaves out those that take minutes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from bench.idle_models import ENCODER, MODEL, token
from bench.report import Record, Row, against, by_turns, parser, row
from bench.transitions import measured
from stoker import AsyncClient, Client
from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.client import EmbedJob, GenerateJob
from stoker.contract import GenerateRequest
from stoker.contract.presence import node_of
from stoker.local.broker import EmbeddedBroker
from stoker.local.process import Process
from stoker.local.stack import worker_command
from stoker.settings import load_settings
from workers.services.publishing import Publisher

ROUND_TRIPS = 300
#: Seconds that a worker may take until it is ready.
START_LIMIT = 60.0
KILLS = 8
#: Jobs of two tokens that are sent at once, how often, and the steps a second of the idle engine that makes them: slots
#: fill and come free, as with a real model that is small.
SMALL, SMALL_TIMES, SMALL_RATE = 200, 3, 60.0
BACKLOG, STARTS = 10_000, 200
STREAMS, STEPS = 32, 400
#: Readers, the streams that they follow, tokens of each, and steps of the idle engine (20 a second) between two of
#: them: 1,000 tokens a second reach the readers, which are one Python process here.
SUBSCRIBERS, FOLLOWED, TOKENS, STEPS_APART = 200, 25, 60, 4


class Bench:
    def __init__(self, home: Path) -> None:
        self._broker = EmbeddedBroker(load_settings(home=home), port=0)
        self.settings = load_settings(home=home, url=self._broker.start())
        self._number = 0

    @contextmanager
    def worker(self, *, one_kind: bool = False, rate: float = 20.0, **changes: object) -> Iterator[Process]:
        """A worker whose engine does nothing, warm; with the default slots and all kinds unless `changes` or
        `one_kind` say otherwise."""
        self._number += 1
        settings = self.settings.model_copy(update=changes)
        name = f"idle-{self._number}@bench"
        command = [part.replace("workers.celery.app", "bench.idle_worker") for part in worker_command(settings, name)]
        env = {"BENCH_RATE": f"{rate:g}", "BENCH_KINDS": "generate" if one_kind else ""}
        process = self._start(name, command, settings.environment() | env)
        until = time.monotonic() + START_LIMIT
        with Client(settings=settings) as client:
            while name not in {node_of(worker.worker) for worker in client.workers()}:
                if process.returncode is not None or time.monotonic() > until:
                    said = process.output()[-2000:]
                    process.stop()
                    raise RuntimeError(f"the idle worker did not become ready within {START_LIMIT:g} s: {said}")
                time.sleep(0.02)
        try:
            yield process
        finally:
            process.stop()

    @contextmanager
    def bare(self) -> Iterator[None]:
        command = [sys.executable, "-m", "celery", "-A", "bench.bare_celery", "worker", "--pool=threads"]
        options = ["--concurrency=16", "--without-gossip", "--without-mingle", "--loglevel=WARNING"]
        process = self._start("bare", [*command, *options], {"BARE_URL": self.settings.address.celery})
        try:
            yield
        finally:
            process.stop()

    def _start(self, name: str, command: list[str], env: dict[str, str]) -> Process:
        return Process(name, command, log=self.settings.logs / f"{name}.log", env=env, grace=3)

    def close(self) -> None:
        self._broker.stop()


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began)


def round_trip(bench: Bench) -> list[Row]:
    """A job that does nothing, from the call to its result, compared with bare Celery on the same broker, by turns."""
    os.environ["BARE_URL"] = bench.settings.address.celery
    from bench.bare_celery import nothing

    with bench.worker(), bench.bare(), Client(settings=bench.settings) as client:
        ours = lambda: client.generate("x", model=MODEL, max_tokens=1).result(30)  # noqa: E731
        theirs = lambda: nothing.delay({"prompt": "x"}).get(timeout=30)  # noqa: E731
        found = by_turns({"ours": lambda: timed(ours), "bare": lambda: timed(theirs)}, ROUND_TRIPS, warm=20)
    return against("round trip of a no-op", "ms", found["ours"], "bare Celery", found["bare"])


def small_jobs(bench: Bench) -> list[Row]:
    """Jobs a second from their submission to the last result, many at once, through one worker."""
    found: dict[str, list[float]] = {}
    with Client(settings=bench.settings) as client:
        for _ in range(SMALL_TIMES):
            with bench.worker(rate=SMALL_RATE):
                found.setdefault("all kinds, default slots", []).append(_rate(client, SMALL, _generate))
                found.setdefault("64 embeddings of a text, with a decoder loaded", []).append(_rate(client, 64, _embed))
            with bench.worker(one_kind=True, rate=SMALL_RATE):
                found.setdefault("one kind, default slots", []).append(_rate(client, SMALL, _generate))
            with bench.worker(generate_slots=1, rate=SMALL_RATE):
                found.setdefault("all kinds, one slot", []).append(_rate(client, SMALL, _generate))
    return [row(f"small jobs: {name}", "jobs/s", samples) for name, samples in found.items()]


def _rate(client: Client, count: int, send: Callable[[Client], GenerateJob | EmbedJob]) -> float:
    for job in [send(client) for _ in range(20)]:
        job.result(60)
    began = time.perf_counter()
    jobs = [send(client) for _ in range(count)]
    for job in jobs:
        job.result(60)
    return count / (time.perf_counter() - began)


def _generate(client: Client) -> GenerateJob:
    return client.generate("x", model=MODEL, max_tokens=2)


def _embed(client: Client) -> EmbedJob:
    return client.embed(["x"], model=ENCODER)


def recovery(bench: Bench) -> list[Row]:
    """From `kill -9` of the worker that runs a stream to its next token from another one, at the default lease."""
    samples = []
    with Client(settings=bench.settings) as client, ExitStack() as workers:
        workers.enter_context(bench.worker())
        for _ in range(KILLS):
            owner = {worker.worker: worker.pid for worker in client.workers()}
            job = client.generate("x", model=MODEL, max_tokens=100_000 // 4)
            stream = job.stream(timeout=60)
            next(stream)
            workers.enter_context(bench.worker())
            os.kill(owner[client.jobs()[job.id]["worker"]], signal.SIGKILL)
            began, last = time.monotonic(), time.monotonic()
            for _ in stream:
                gap, last = time.monotonic() - last, time.monotonic()
                if gap > 2.0:
                    samples.append(last - began)
                    break
            stream.close()
    return [row("recovery after kill -9, lease 10 s", "s", samples)]


def backlog(bench: Bench) -> list[Row]:
    """Seconds between two starts in one slot, with few and with many jobs waiting behind."""
    found: dict[int, list[float]] = {}
    with bench.worker(generate_slots=1), Client(settings=bench.settings) as client:
        for waiting in (STARTS, BACKLOG, STARTS, BACKLOG):
            blocker = client.generate("x", model=MODEL, max_tokens=30_000)
            next(blocker.stream(cancel_on_close=False))
            for _ in range(waiting):
                client.link.submit(_request(), str(uuid.uuid4()))
            blocker.cancel()
            key, left = keys.open_jobs(keys.queue(MODEL, "generate")), waiting - STARTS
            while client.redis.zcard(key) >= waiting:
                time.sleep(0.0005)
            began = time.monotonic()
            while client.redis.zcard(key) > left + 1:
                time.sleep(0.0005)
            found.setdefault(waiting, []).append(1000 * (time.monotonic() - began) / (STARTS - 2))
            _empty(client)
    name = f"{BACKLOG:,} waiting, from one start to the next"
    return against(name, "ms", found[BACKLOG], f"{STARTS}", found[STARTS])


def _request() -> GenerateRequest:
    return GenerateRequest(model=MODEL, prompt="x", max_tokens=1)


def _empty(client: Client) -> None:
    """Forget what waits, and let what runs end."""
    queue = keys.queue(MODEL, "generate")
    client.redis.delete(keys.ready(queue), *(keys.backlog(queue, priority) for priority in range(10)))
    time.sleep(0.5)
    client.redis.delete(keys.open_jobs(queue), keys.client("default", queue), keys.dispatched(queue), keys.sizes(queue))


def publishing(bench: Bench) -> list[Row]:
    """Microseconds a token, from the publisher's queue to the broker's answer, `STREAMS` tokens a step."""
    publisher = Publisher(connect(bench.settings))
    publisher.start()
    samples = []
    for turn in range(6):
        jobs = [f"bench-{turn}-{stream}" for stream in range(STREAMS)]
        began = time.perf_counter()
        for step in range(STEPS):
            publisher.publish([(job, token(step, step + 1 == STEPS)) for job in jobs])
            publisher.flush(jobs[0])
        samples.append(1e6 * (time.perf_counter() - began) / (STEPS * STREAMS))
    publisher.stop()
    return [row(f"publishing a token, {STREAMS} streams", "us", samples[1:])]


def subscribers(bench: Bench) -> list[Row]:
    """Milliseconds from the engine's hand to a reader's, 200 readers of 25 streams of 5 tokens a second."""
    heard: list[tuple[float, float]] = []
    began: list[float] = []

    async def read(client: AsyncClient, job_id: str) -> int:
        count = 0
        job = await client.job(job_id)
        async for entry in job.stream(timeout=60, cancel_on_close=False):  # type: ignore[union-attr]
            heard.append((entry.logit, 1000 * (time.time() - entry.logit)))
            if count == 0:
                began.append(time.time())
            count += 1
        return count

    async def session() -> list[int]:
        async with AsyncClient(settings=bench.settings) as client:
            jobs = [
                await client.generate("x", model=MODEL, max_tokens=TOKENS, top_k=STEPS_APART) for _ in range(FOLLOWED)
            ]
            return await asyncio.gather(*(read(client, jobs[n % FOLLOWED].id) for n in range(SUBSCRIBERS)))

    with bench.worker(generate_slots=FOLLOWED):
        counts = asyncio.run(session())
    # What was made before the last reader came is replayed, and says nothing about the way of a live one.
    live = [delay for made, delay in heard if made > max(began)]
    lost = SUBSCRIBERS * TOKENS - sum(counts)
    return [
        row(f"delivery to {SUBSCRIBERS} subscribers", "ms", live),
        row(f"delivery to {SUBSCRIBERS} subscribers, p99", "ms", [float(np.percentile(live, 99))]),
        row(f"delivery to {SUBSCRIBERS} subscribers, lost", "tokens", [lost]),
    ]


def transitions(bench: Bench) -> list[Row]:
    """What each transition costs, without a worker."""
    with closing(connect(bench.settings, loads_functions=True)) as redis:
        return measured(redis)


SHORT = (transitions, round_trip, small_jobs, publishing)
PARTS = (*SHORT, subscribers, backlog, recovery)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("parts", nargs="*", metavar="PART", help=", ".join(part.__name__ for part in PARTS))
    options = made.parse_args()
    record = Record("queue", options.out)
    for part in SHORT if options.quick else PARTS:
        if options.parts and part.__name__ not in options.parts:
            continue
        with tempfile.TemporaryDirectory() as home:
            bench = Bench(Path(home))
            try:
                record.part(part.__name__, partial(part, bench))
            finally:
                bench.close()
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
