"""What the sides of the training benchmarks share: the rows that every step sees, and the loop that times a step.

Import it behind `engine.platform.blas.boot()`: it imports MLX.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from engine.training.data import TokenizedExample
from stoker.contract import TrainReport


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"])


def rows(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """int32 (batch, length + 1): every step sees the same, so that no side has the easier one."""
    return np.random.default_rng(0).integers(3, vocabulary, (batch, length + 1), dtype=np.int32)


def examples(folder: Path, batch: int, length: int) -> list[TokenizedExample]:
    return [TokenizedExample(row, np.arange(length + 1) > 0) for row in rows(batch, length, vocabulary(folder))]


def answer_steps(
    reports: Iterator[TrainReport | None], answer: Callable[..., None], facts: Mapping[str, object] | None = None
) -> None:
    """Say that the run is ready, with `facts`, and then what each step was: one for each line on standard input."""
    mx.clear_cache()
    mx.reset_peak_memory()
    answer(ready=True, **(facts or {}))
    for _ in sys.stdin:
        began = time.perf_counter()
        report = next(report for report in reports if report is not None)
        answer(seconds=time.perf_counter() - began, loss=report.loss, peak=int(mx.get_peak_memory()))
