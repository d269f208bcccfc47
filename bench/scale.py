"""What brokers bear, and where a fleet of 1,000 workers with 100,000 streams breaks: `make bench-scale`.

A broker is one core that does one thing after the other. What each thing costs it is measured
(`bench/results/queue.json`, `bench/results/scale-costs.json`); who asks it for what, and when, is simulated, event by
event. The same seed gives the same numbers. What is assumed of streams and workers stands in `Plan`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np

from bench.report import RESULTS, Row, row, shown, write
from stoker.broker.keys import RESULT_TTL

#: Tokens that a worker's publisher sends in one script (`workers/services/publishing.py`).
BATCH = 512
#: Brokers that the streams are split over, in turn, and seconds that each fleet is simulated.
SPLITS, SECONDS = (25, 40, 50, 100), 4.0
GIGABYTE = 1e9


@dataclass(frozen=True)
class Costs:
    """Seconds of a broker's core. `rest`: what a job costs beyond its transitions and tokens: Celery's commands, its
    client's subscription and replay. `step`, `token`: of a script that publishes. `heard`: a token to one reader.
    `worker`, `stream`: one of them for a second, at work or not. Then bytes of a token."""

    submit: float
    claim: float
    complete: float
    rest: float
    step: float
    token: float
    heard: float
    worker: float
    stream: float
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    bytes_kept: float = 0.0

    @property
    def job(self) -> float:
        return self.submit + self.claim + self.complete + self.rest

    @classmethod
    def of(cls, queue: Mapping[str, float], scale: Mapping[str, float]) -> Costs:
        """From the medians of both files, in their units."""
        transitions = [queue[f"transition: {name}"] for name in ("submit", "claim", "complete")]
        sizes = {
            int(name.split()[4]): spent for name, spent in scale.items() if name.startswith("publishing a step of")
        }
        token, step = np.polyfit(list(sizes), list(sizes.values()), 1)
        rest = (
            scale["a job of two tokens, whole"]
            - sum(transitions)
            - 2 * (step + token + scale["a token to one more reader"])
        )
        seconds = [*transitions, max(0.0, rest), max(0.0, step), token, scale["a token to one more reader"]]
        seconds += [scale["a second of an idle worker"], scale["a second of a running stream"]]
        sizes_of = ("a token from its worker", "a token to a reader", "a token that is kept")
        return cls(*(float(spent) / 1e6 for spent in seconds), *(scale[name] for name in sizes_of))

    @classmethod
    def committed(cls) -> Costs:
        return cls.of(*(_medians(name) for name in ("queue", "scale-costs")))


def _medians(name: str) -> dict[str, float]:
    rows = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    # A part that failed is a row without a value.
    return {entry["name"]: entry["p50"] for entry in rows if "p50" in entry}


@dataclass(frozen=True)
class Plan:
    """Workers of one broker and what they do. `slots`: streams that a worker runs at once; `rate`: steps of its engine
    a second, each a token of every stream; `tokens`: of a stream, on average (geometric, so that a fleet may begin in
    the middle); `arrivals`: streams that are sent a second (Poisson); `readers`: of a stream."""

    workers: int = 1000
    slots: int = 110
    rate: float = 20.0
    tokens: float = 400.0
    arrivals: float = 5000.0
    readers: int = 1

    @property
    def streams(self) -> float:
        """That run at once, where none waits (Little 1961)."""
        return self.arrivals * self.tokens / self.rate

    @property
    def tokens_a_second(self) -> float:
        return self.arrivals * self.tokens

    def split(self, brokers: int) -> Plan:
        """The share of one of so many brokers."""
        return replace(self, workers=self.workers // brokers, arrivals=self.arrivals / brokers)


def load(costs: Costs, plan: Plan) -> float:
    """Cores of brokers that the plan takes, where they keep up: a script a step of each worker."""
    steps = plan.workers * plan.rate if plan.streams > plan.workers else plan.tokens_a_second
    return (
        plan.arrivals * costs.job
        + steps * costs.step
        + plan.tokens_a_second * (costs.token + plan.readers * costs.heard)
        + plan.workers * costs.worker
        + plan.streams * costs.stream
    )


@dataclass(eq=False)
class Worker:
    """`ends`: the steps after which its streams end, and when each began."""

    free: int
    steps: int = 0
    ends: list[tuple[int, int, float]] = field(default_factory=list)
    #: When steps were made that are not sent yet, their tokens, and the streams that ended with them.
    unsent: deque[tuple[float, int, list[float]]] = field(default_factory=deque)
    sending: bool = False
    decoding: bool = False


@dataclass(frozen=True)
class Measured:
    """Of one broker, from the first second on. `busy`: share of its core. `waits`: seconds that what is asked of it
    waits. `delays`: seconds from a step to its tokens' readers, with the tokens. `lives`: seconds that streams ran.
    `running`: streams at once, on average. `queued`: seconds that streams waited for a slot."""

    seconds: float
    busy: float
    waits: list[float]
    delays: list[tuple[float, int]]
    lives: list[float]
    queued: list[float]
    running: float
    sent: int
    left: int

    def delay(self, percent: float) -> float:
        """Of tokens."""
        ordered = sorted(self.delays)
        counts = np.cumsum([tokens for _, tokens in ordered])
        return ordered[int(np.searchsorted(counts, counts[-1] * percent / 100))][0] if ordered else 0.0

    @property
    def keeps_up(self) -> bool:
        """Whether its workers' tokens do not pile up: a tenth of a second's is on its way at any time."""
        made = sum(tokens for _, tokens in self.delays)
        return self.left <= 0.1 * made / self.seconds + BATCH


class Cell:
    """One broker with its workers, event by event."""

    def __init__(self, costs: Costs, plan: Plan, seed: int) -> None:
        self._costs, self._plan, self._random = costs, plan, random.Random(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        #: When the broker will have done all that it was asked for until now.
        self._free_at = self._asked = 0.0
        self._workers = [Worker(plan.slots) for _ in range(plan.workers)]
        #: Streams that wait, by when they were sent; workers that ask for one, the longest wait first.
        self._waiting: deque[float] = deque()
        self._asking: deque[Worker] = deque()
        self._now = self._last = self._area = 0.0
        self._running = self.arrived = self.ended = 0
        self._clear()

    def _clear(self) -> None:
        """What is measured from now on."""
        self._done_before, self._area, self._sent = self._done, 0.0, 0
        self._waits: list[float] = []
        self._delays: list[tuple[float, int]] = []
        self._lives: list[float] = []
        self._queued: list[float] = []

    def run(self, seconds: float, warm_up: float = 1.0) -> Measured:
        self._begin()
        for end in (warm_up, warm_up + seconds):
            while self._events and self._events[0][0] <= end:
                self._now, _, action, arguments = heappop(self._events)
                action(*arguments)
            self._now = end
            self._count_running(0)
            if end == warm_up:
                self._clear()
        left = sum(tokens for worker in self._workers for _, tokens, _ in worker.unsent)
        return Measured(
            seconds, (self._done - self._done_before) / seconds, self._waits, self._delays, self._lives, self._queued,
            self._area / seconds, self._sent, left,
        )  # fmt: skip

    @property
    def _done(self) -> float:
        """Seconds that the broker has worked until now."""
        return self._asked - max(0.0, self._free_at - self._now)

    @property
    def open(self) -> int:
        """Streams that wait or run, or whose end is on its way."""
        return self.arrived - self.ended

    def _begin(self) -> None:
        """In the middle: as many streams run as will on average, each worker in a step of its own."""
        for worker in self._workers:
            self._asking.append(worker)
            self._at(self._random.random(), self._beat, worker)
        for _ in range(min(round(self._plan.streams), self._plan.workers * self._plan.slots)):
            self.arrived += 1
            self._start(self._taker(), self._random.random() / self._plan.rate)
        self._at(self._random.expovariate(self._plan.arrivals), self._arrive)

    def _at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heappush(self._events, (time, self._count, action, arguments))

    def _ask(self, cost: float) -> float:
        """The broker does one thing after the other; when it will have done this."""
        begin = max(self._now, self._free_at)
        self._waits.append(begin - self._now)
        self._asked += cost
        self._free_at = begin + cost
        return self._free_at

    def _count_running(self, more: int) -> None:
        self._area += self._running * (self._now - self._last)
        self._running, self._last = self._running + more, self._now

    def _beat(self, worker: Worker) -> None:
        """What a worker and its streams ask for without end: presence, leases, questions for jobs, marks of cancels."""
        self._ask(self._costs.worker + len(worker.ends) * self._costs.stream)
        self._at(self._now + 1.0, self._beat, worker)

    def _arrive(self) -> None:
        self.arrived += 1
        self._at(self._ask(self._costs.submit + self._costs.rest), self._wait, self._now)
        self._at(self._now + self._random.expovariate(self._plan.arrivals), self._arrive)

    def _wait(self, sent: float) -> None:
        self._waiting.append(sent)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and self._asking:
            worker = self._taker()
            self._queued.append(self._now - self._waiting.popleft())
            self._at(self._ask(self._costs.claim), self._start, worker, 1.0 / self._plan.rate)

    def _taker(self) -> Worker:
        """The worker that has asked for longest; it asks again while it has slots."""
        worker = self._asking.popleft()
        worker.free -= 1
        if worker.free:
            self._asking.append(worker)
        return worker

    def _start(self, worker: Worker, first: float) -> None:
        self._count_running(1)
        chance = 1.0 / self._plan.tokens
        length = 1 + int(math.log1p(-self._random.random()) / math.log1p(-chance)) if chance < 1 else 1
        self._count += 1
        heappush(worker.ends, (worker.steps + length, self._count, self._now))
        if not worker.decoding:
            worker.decoding = True
            self._at(self._now + first, self._step, worker)

    def _step(self, worker: Worker) -> None:
        """A token of each stream; it is sent by a thread of its own, so the next step does not wait for it."""
        worker.steps += 1
        tokens, ended = len(worker.ends), []
        while worker.ends and worker.ends[0][0] <= worker.steps:
            ended.append(heappop(worker.ends)[2])
            self._count_running(-1)
            self._lives.append(self._now - ended[-1])
        worker.unsent.append((self._now, tokens, ended))
        self._send(worker)
        worker.decoding = bool(worker.ends)
        if worker.decoding:
            self._at(self._now + 1.0 / self._plan.rate, self._step, worker)

    def _send(self, worker: Worker) -> None:
        """All that is unsent, in one script up to `BATCH` tokens."""
        if worker.sending or not worker.unsent:
            return
        batch: list[tuple[float, int, list[float]]] = []
        tokens = 0
        while worker.unsent and (not batch or tokens + worker.unsent[0][1] <= BATCH):
            batch.append(worker.unsent.popleft())
            tokens += batch[-1][1]
        worker.sending = True
        cost = self._costs.step + tokens * (self._costs.token + self._plan.readers * self._costs.heard)
        self._at(self._ask(cost), self._sent_to_all, worker, batch, tokens)

    def _sent_to_all(self, worker: Worker, batch: list[tuple[float, int, list[float]]], tokens: int) -> None:
        worker.sending = False
        self._sent += tokens
        for made, count, ended in batch:
            self._delays.append((self._now - made, count))
            for _ in ended:
                self._at(self._ask(self._costs.complete), self._leave, worker)
        self._send(worker)

    def _leave(self, worker: Worker) -> None:
        self.ended += 1
        worker.free += 1
        if worker.free == 1:
            self._asking.append(worker)
        self._dispatch()


def bears(costs: Costs) -> list[Row]:
    """What one broker bears of one thing alone."""

    def tokens(rows: int, readers: int) -> float:
        return 1.0 / (costs.step / rows + costs.token + readers * costs.heard)

    found = {
        "transitions: submissions": 1.0 / costs.submit,
        "transitions: claims": 1.0 / costs.claim,
        "transitions: ends": 1.0 / costs.complete,
        "whole jobs, without their tokens": 1.0 / costs.job,
        "tokens of 1 stream a worker, 1 reader": tokens(1, 1),
        "tokens of 16 streams a worker, 1 reader": tokens(16, 1),
        "tokens of 100 streams a worker, 1 reader": tokens(100, 1),
        "tokens of 100 streams a worker, 4 readers": tokens(100, 4),
    }
    rows = [row(f"one broker bears: {name}", "1/s", [value]) for name, value in found.items()]
    return [*rows, row("one broker bears: idle workers", "workers", [1.0 / costs.worker])]


def needs(costs: Costs, plan: Plan) -> list[Row]:
    """What the whole plan takes of brokers."""
    day, minutes = (plan.tokens_a_second * seconds * costs.bytes_kept / GIGABYTE for seconds in (RESULT_TTL, 600))
    found = [
        ("tokens", "1/s", plan.tokens_a_second),
        ("jobs", "1/s", plan.arrivals),
        ("cores of brokers", "cores", load(costs, plan)),
        ("of these, publishing", "cores", plan.workers * plan.rate * costs.step + plan.tokens_a_second * costs.token),
        ("of these, readers", "cores", plan.tokens_a_second * plan.readers * costs.heard),
        ("of these, jobs", "cores", plan.arrivals * costs.job),
        ("of these, workers and streams that only are there", "cores",
         plan.workers * costs.worker + plan.streams * costs.stream),
        ("network into brokers", "Gbit/s", 8 * plan.tokens_a_second * costs.bytes_in / GIGABYTE),
        ("network out of brokers", "Gbit/s", 8 * plan.tokens_a_second * plan.readers * costs.bytes_out / GIGABYTE),
        ("memory of streams, kept for a day", "GB", day),
        ("memory of streams, kept for 10 minutes", "GB", minutes),
    ]  # fmt: skip
    return [row(f"the fleet needs: {name}", unit, [value]) for name, unit, value in found]


def fleet(costs: Costs, plan: Plan, brokers: int, seconds: float, seed: int = 0) -> list[Row]:
    """All brokers of a split by model, each with its own workers and streams."""
    share = plan.split(brokers)
    cells = [Cell(costs, share, seed + number).run(seconds) for number in range(brokers)]
    found: list[tuple[str, str, list[float]]] = [
        ("busy", "share", [cell.busy for cell in cells]),
        ("a token's way, p50", "ms", [1000 * cell.delay(50) for cell in cells]),
        ("a token's way, p99", "ms", [1000 * cell.delay(99) for cell in cells]),
        ("streams at once", "streams", [sum(cell.running for cell in cells)]),
        ("brokers that keep up", "brokers", [sum(cell.keeps_up for cell in cells)]),
    ]
    return [row(f"{brokers} brokers: {name}", unit, samples) for name, unit, samples in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    given = Plan()
    parser.add_argument("--workers", type=int, default=given.workers)
    parser.add_argument("--streams", type=float, default=given.streams, help="that run at once")
    parser.add_argument("--rate", type=float, default=given.rate, help="tokens of a stream a second")
    parser.add_argument("--tokens", type=float, default=given.tokens, help="of a stream, on average")
    parser.add_argument("--brokers", type=int, nargs="*", default=SPLITS)
    said = parser.parse_args()
    slots = int(1.1 * said.streams / said.workers) + 1
    plan = Plan(said.workers, slots, said.rate, said.tokens, said.streams * said.rate / said.tokens)
    costs = Costs.committed()
    rows = [*bears(costs), *needs(costs, plan)]
    for brokers in said.brokers:
        rows += fleet(costs, plan, brokers, SECONDS)
    if said == parser.parse_args([]):
        write("scale", rows)
    else:
        # Another plan than the page's: its rows are for its reader, and the committed ones stay.
        print("\n".join(shown("scale", one) for one in rows))


if __name__ == "__main__":
    main()
