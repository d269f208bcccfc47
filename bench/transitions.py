"""What each transition of the ledger costs the broker, by its own count, and the caller (`bench.queue`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.report import Row, row
from stoker.broker import keys, ledger
from stoker.broker.ledger.call import Call
from stoker.client.requests import generate_request
from stoker.client.submission import job_record

QUEUE = keys.queue("bench", "generate")
#: Jobs of one round, and rounds.
JOBS, ROUNDS = 500, 5
#: As a worker has it.
WORKER = "worker@bench"


def measured(redis: Any) -> list[Row]:
    """Microseconds of the broker a transition, with `JOBS` in the queue and fewer; prints its transitions a second."""
    found: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for name, action in _life(redis, number):
            cost, wall = _cost(redis, action)
            # The first round sends the library.
            if number:
                found.setdefault(name, []).append(cost)
                found.setdefault(f"{name}, seen by its caller", []).append(wall)
    rows = [row(f"transition: {name}", "us", samples) for name, samples in found.items()]
    for one in rows:
        if "caller" not in one.name:
            print(f"{one.name}: {one.p50:.0f} us, {1e6 / one.p50:,.0f} a second of one broker")
    return rows


Action = Callable[[int], object]


def _life(redis: Any, round_number: int) -> list[tuple[str, Action]]:
    """Every transition, in an order in which each finds what it needs: the jobs of one round, sent and ended."""
    ids = [f"bench-{round_number}-{number}" for number in range(2 * JOBS)]
    request = generate_request("bench", "x", 0, {"max_tokens": 1})

    def submit(number: int) -> Call[Any]:
        return ledger.submission(ids[number], job_record(request, ids[number]))

    def claim(number: int, turn: str) -> object:
        redis.rpop(keys.ready(QUEUE))
        return ledger.claim(redis, ids[number], QUEUE, f"{turn}-{number}", "tag", WORKER)

    return [
        ("submit", lambda number: submit(number).on(redis)),
        ("claim", lambda number: claim(number, "one")),
        ("out of memory", lambda number: ledger.count_out_of_memory(redis, ids[number], QUEUE, f"one-{number}")),
        ("release", lambda number: ledger.release(redis, ids[number], QUEUE, f"one-{number}")),
        ("claim again", lambda number: claim(number, "two")),
        ("pin", lambda number: ledger.pin(redis, ids[number], 1)),
        ("dead-letter", lambda number: ledger.dead_letter(redis, ids[number], QUEUE, f"two-{number}", WORKER, "full")),
        ("complete", lambda number: ledger.complete(
            redis, ids[number], QUEUE, f"two-{number}", ledger.success(ids[number], {}))),
        ("submit before a cancel", lambda number: submit(JOBS + number).on(redis)),
        ("recover, nothing lost", lambda number: ledger.recover(redis, QUEUE, 3600)),
        ("cancel", lambda number: ledger.cancel(redis, ids[JOBS + number], QUEUE)),
    ]  # fmt: skip


def _cost(redis: Any, action: Action) -> tuple[float, float]:
    """Microseconds of one: of the broker in its scripts, and of the caller."""
    redis.config_resetstat()
    began = time.perf_counter()
    for number in range(JOBS):
        action(number)
    wall = time.perf_counter() - began
    counts = redis.info("commandstats")
    spent = sum(counts[name]["usec"] for name in ("cmdstat_fcall", "cmdstat_evalsha", "cmdstat_eval") if name in counts)
    return spent / JOBS, 1e6 * wall / JOBS
