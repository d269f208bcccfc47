"""A rank of `bench.fleet`, as a process: `python -m bench.fleet_rank train FOLDER RANKS PLAN`, with MLX's variables. It
makes a step for each line on standard input, and says on standard output what it was: a JSON object a line."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from engine.platform import blas

blas.boot(int(os.environ["OPENBLAS_NUM_THREADS"]))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from engine.checkpoints.loading import load  # noqa: E402
from engine.training.data import TokenizedExample  # noqa: E402
from engine.training.ranks import ALONE, MlxRanks, Ranks  # noqa: E402
from engine.training.trainer import Trainer  # noqa: E402
from stoker.contract import TrainRequest  # noqa: E402
from workers.group.starting import place_of  # noqa: E402

LORA_RANK = 8


def answer(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def group(size: int) -> Ranks:
    """The ranks that share the steps: met as a worker's are."""
    if size == 1:
        return ALONE
    place = place_of(os.environ)
    ranks = MlxRanks(place.rank, place.size)
    ranks.meet(place.backend)
    return ranks


def train(folder: Path, size: int, plan: dict[str, Any]) -> None:
    """Every step sees the same tokens: as many micro-batches as two ranks take at once."""
    ranks, accumulation = group(size), 2
    request = TrainRequest(
        model="bench", name="bench", dataset="none", steps=1_000_000, rank=LORA_RANK, batch_size=plan["batch"],
        accumulation=accumulation,
    )  # fmt: skip
    model, length = load("bench", [str(folder)]), plan["length"]
    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    shape = plan["batch"] * accumulation, length + 1
    lines = np.random.default_rng(0).integers(3, vocabulary, shape, dtype=np.int32)
    examples = [TokenizedExample(line, np.arange(length + 1) > 0) for line in lines]
    reports = Trainer(model.decoder, request, examples, ranks=ranks).run()
    mx.clear_cache()
    mx.reset_peak_memory()
    answer(ready=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        report = next(reports)
        while report is None:
            report = next(reports)
        answer(seconds=time.perf_counter() - began, loss=report.loss, peak=int(mx.get_peak_memory()))


if __name__ == "__main__":
    _, job, where, count, said = sys.argv
    train(Path(where), int(count), json.loads(said))
