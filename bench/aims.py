"""What each row of a benchmark should be: the one place. Scripts judge their rows by it, and the pages quote it
(`tests/bench/test_aims.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Aim:
    """At least, or at most, so much."""

    bound: float
    upper: bool

    def met(self, low: float, high: float) -> bool | None:
        """Whether the whole of this spread is on the good side; None where the spread crosses the bound."""
        good, bad = (high <= self.bound, low > self.bound) if self.upper else (low >= self.bound, high < self.bound)
        return True if good else False if bad else None

    def __str__(self) -> str:
        return f"at {'most' if self.upper else 'least'} {self.bound:,g}"


def least(bound: float) -> Aim:
    return Aim(bound, upper=False)


def most(bound: float) -> Aim:
    return Aim(bound, upper=True)


#: By the name of the benchmark's file in `bench/results`, and of the row in it.
AIMS: Mapping[str, Mapping[str, Aim]] = {
    "generate": {
        "1 stream, decode, against mlx-lm": least(1.25),
        "8 streams, decode, against mlx-lm": least(1.15),
        "8 streams, prompts and all, against mlx-lm": least(1.05),
        "8 streams over 8 adapters, against one adapter": least(0.95),
        "8 streams over 8 adapters, against the bare base": least(0.85),
        "first token while 7 streams run, against alone": most(2),
        "p99 between tokens while 300 tokens are prefilled, against none": most(2),
        "8 streams through Redis, against the engine alone": least(0.97),
    },
    "generate-gpu": {
        "1 stream, decode, against mlx-lm": least(1.3),
        "32 streams, decode, against mlx-lm": least(2),
        "32 streams, prompts and all, against mlx-lm": least(1.5),
        "32 streams over 8 adapters, against one adapter": least(0.95),
        "32 streams over 8 adapters, against the bare base": least(0.85),
        "first token while 31 streams run, against alone": most(2),
        "p99 between tokens while 1,000 tokens are prefilled, against none": most(2),
    },
    "decode-gpu": {
        "1 row: share of a step that the device works": least(0.45),
        "32 rows: share of a step that the device works": least(0.5),
    },
    "train": {
        "tokens of a step, against mlx-lm": least(1.1),
        "peak memory, against mlx-lm": most(0.8),
        "adapter of rank 8, from disk into the stacks": most(10),
        "p95 between tokens during a run, against alone": most(2),
    },
    "train-gpu": {
        "tokens of a step, against mlx-lm": least(1.5),
        "peak memory, against mlx-lm": most(0.8),
        "adapter of rank 8, from disk into the stacks": most(10),
        "p95 between tokens during a run, against alone": most(2),
    },
    "embed": {
        "16 tokens, against sentence-transformers": least(1.1),
        "128 tokens, against sentence-transformers": least(1),
        "mixed, against sentence-transformers": least(1.1),
        "mixed, against one text at a time": least(4),
        "jobs of 100 texts through Redis, against the engine alone": least(0.9),
        "64 clients with a text each, against one with 64": least(0.7),
    },
    "embed-gpu": {
        "mixed, against sentence-transformers": least(2),
        "128 tokens, against sentence-transformers": least(1),
        "mixed, the first time": least(5000),
    },
    "queue": {
        "round trip of a no-op, against bare Celery": most(1.3),
        "recovery after kill -9, lease 10 s": most(15),
        "10,000 waiting, from one start to the next, against 200": most(1.1),
        "small jobs: all kinds, default slots": least(250),
        "publishing a token, 32 streams": most(60),
        "delivery to 200 subscribers, p99": most(50),
    },
    "gateway": {
        "32 streams, a steady worker, against the Python client": least(0.95),
        "32 streams, smollm2-135m-instruct, against the Python client": least(0.95),
        "first token of one stream, more than the Python client's": most(5),
    },
}


def aim_of(bench: str, row: str) -> Aim | None:
    return AIMS.get(bench, {}).get(row)
