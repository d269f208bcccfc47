"""Training on ranks of this machine: `python -m bench.fleet`. Steps a second on one rank, which is the path without a
group, and on two ranks of MLX's ring over loopback, by turns; on random weights.

Each rank is a process (`python -m bench.fleet FOLDER`) that makes a step for each line on standard input. Two ranks
have half of the cores each, so that both sides have the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.report import row, write
from workers.group.starting import LOOPBACK, free_ports

SHAPE = "smollm2-135m"
#: Tokens that are drawn from; the shape has more.
VOCABULARY = 10_000
ROUNDS = 12
BATCH, ACCUMULATION, LENGTH, RANK = 1, 2, 32, 8


def side(folder: Path) -> None:
    """One rank."""
    from engine.platform import blas

    blas.boot(int(os.environ["OPENBLAS_NUM_THREADS"]))
    import numpy as np

    from engine.checkpoints.loading import load
    from engine.training.data import TokenizedExample
    from engine.training.ranks import ALONE, MlxRanks, Ranks
    from engine.training.trainer import Trainer
    from stoker.contract import TrainRequest

    ranks: Ranks = ALONE
    if "MLX_HOSTFILE" in os.environ:
        ring = MlxRanks(int(os.environ["MLX_RANK"]), 2)
        ring.meet("ring")
        ranks = ring
    request = TrainRequest(
        model="bench", name="bench", dataset="none", steps=1_000_000, rank=RANK, batch_size=BATCH,
        accumulation=ACCUMULATION,
    )  # fmt: skip
    lines = np.random.default_rng(0).integers(3, VOCABULARY, (BATCH * ACCUMULATION, LENGTH + 1), dtype=np.int32)
    examples = [TokenizedExample(line, np.arange(LENGTH + 1) > 0) for line in lines]
    reports = Trainer(load("bench", [str(folder)]).decoder, request, examples, ranks=ranks).run()
    print("ready", flush=True)
    for _ in sys.stdin:
        while next(reports) is None:
            pass
        print("done", flush=True)


@contextmanager
def started(folder: Path, ranks: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ready."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    if ranks > 1:
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"{LOOPBACK}:{port}"] for port in free_ports(ranks)]), "utf-8")
        env["MLX_HOSTFILE"] = str(hosts)
    with ExitStack() as leaving:
        found = []
        for rank in range(ranks):
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.fleet", str(folder)], env={**env, "MLX_RANK": str(rank)}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            leaving.callback(process.wait)
            leaving.callback(process.kill)
            found.append(process)
        for process in found:
            answer(process, "ready")
        yield found


def answer(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    while (said := process.stdout.readline()) != f"{word}\n":
        if not said:
            raise SystemExit(f"a rank ended (exit code {process.wait()})")


def step(processes: list[subprocess.Popen[str]]) -> float:
    """Seconds of a step on all of them."""
    began = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        answer(process, "done")
    return time.perf_counter() - began


def main() -> None:
    import mlx.core as mx

    from bench import shapes

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "model")
        shapes.write(folder, SHAPE, mx.float32)
        with started(folder, 1) as one, started(folder, 2) as two:
            for warming in (one, two):
                step(warming)
            pairs = [(step(one), step(two)) for _ in range(ROUNDS)]
    rows = [
        row("steps a second, one rank", "steps/s", [1 / alone for alone, _ in pairs]),
        row("steps a second, two ranks of half the cores each", "steps/s", [1 / shared for _, shared in pairs]),
        row("two ranks, as a multiple of one", "times", [alone / shared for alone, shared in pairs]),
    ]
    print(write("fleet", rows))


if __name__ == "__main__":
    side(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
