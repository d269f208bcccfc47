"""LoRA training and mlx-lm's trainer, step by step in one run; adapters from disk to first use; decode during a run.

`python -m bench.train` on a CPU (with the peers' environment of `make peers`), `python -m bench.train --gpu --out DIR`
on a GPU. Weights are random, the same for both sides; every step sees the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.platform import blas

blas.boot()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from bench import shapes  # noqa: E402
from bench.report import RESULTS, Record  # noqa: E402
from engine.platform import probe  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    shape: str
    dtype: mx.Dtype
    batch: int
    length: int
    warm: int
    steps: int
    #: Streams that decode during a run, and the tokens of each.
    streams: int
    tokens: int
    #: Rows and tokens of that run's micro-steps.
    micro_step: tuple[int, int]


PLANS = {
    "gpu": Plan("qwen2.5-0.5b", mx.bfloat16, 8, 512, warm=6, steps=60, streams=8, tokens=400, micro_step=(8, 512)),
    "cpu": Plan("smollm2-135m", mx.float32, 4, 128, warm=2, steps=5, streams=2, tokens=80, micro_step=(1, 32)),
    "tiny": Plan("tiny", mx.float32, 2, 32, warm=1, steps=2, streams=2, tokens=20, micro_step=(1, 16)),
}


class Side:
    """One trainer in a process of its own."""

    def __init__(self, name: str, python: Path, folder: Path, plan: Plan) -> None:
        command = [str(python), "-m", "bench.train_side", name, str(folder), str(plan.batch), str(plan.length)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}; see its output above")
        return dict(json.loads(line))

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def steps(plan: Plan, folder: Path, peer: Path) -> Rows:
    """Both sides in turns: what the machine does otherwise meets both alike."""
    sides = [Side("stoker", Path(sys.executable), folder, plan), Side("mlx-lm", peer, folder, plan)]
    found: dict[str, list[dict[str, Any]]] = {}
    failures: Rows = []
    try:
        for side in list(sides):
            try:
                side.answer()
                found[side.name] = []
            except RuntimeError as error:
                # The other is measured all the same.
                failures.append({"name": side.name, "error": str(error)})
        for _ in range(plan.warm + plan.steps):
            for side in sides:
                if side.name in found:
                    found[side.name].append(side.step())
    finally:
        for side in sides:
            side.end()
    rows = [_side_row(name, answers, plan) for name, answers in found.items()]
    if failures:
        return rows + failures
    ours, theirs = rows
    pairs = zip(found["stoker"][plan.warm :], found["mlx-lm"][plan.warm :], strict=True)
    low, speed, high = np.percentile([other["seconds"] / own["seconds"] for own, other in pairs], (20, 50, 80))
    rows.append(
        {
            "name": "stoker / mlx-lm",
            # Of two steps one after the other: what the machine does otherwise changes from minute to minute.
            "speed": float(speed),
            "speed_p20": float(low),
            "speed_p80": float(high),
            "memory": ours["peak_bytes"] / theirs["peak_bytes"],
            "first_loss_difference": abs(ours["first_loss"] - theirs["first_loss"]),
        }
    )
    return rows


def _side_row(name: str, answers: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    seconds = [answer["seconds"] for answer in answers[plan.warm :]]
    median = statistics.median(seconds)
    return {
        "name": f"LoRA step, {plan.shape}, {plan.batch} x {plan.length}: {name}",
        "milliseconds": 1000 * median,
        "fastest": 1000 * min(seconds),
        "tokens_per_second": plan.batch * plan.length / median,
        "peak_bytes": answers[-1]["peak"],
        "peak_bytes_warm": answers[plan.warm - 1]["peak"],
        "first_loss": answers[0]["loss"],
        "last_loss": answers[-1]["loss"],
    }


def loading(plan: Plan, folder: Path) -> Rows:
    """Adapters of rank 8 from disk to the first hidden states that they changed, and what a row of them costs."""
    from engine.adapters.lora import LoraConfig, initialise
    from engine.adapters.pool import AdapterPool
    from engine.adapters.store import AdapterStore
    from engine.checkpoints.loading import load

    model = load("bench", [str(folder)])
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    token = mx.array([[5]])
    with tempfile.TemporaryDirectory() as home:
        store = AdapterStore(Path(home))
        for number in range(12):
            store.write(
                "bench", f"a{number}", initialise(LoraConfig(8, 16.0, targets), model.linear_shapes, number), {}
            )
        pool = AdapterPool(model, store)
        load_seconds, use_seconds = [], []
        for number in range(12):
            began = time.perf_counter()
            row = pool.acquire(f"a{number}")
            loaded = time.perf_counter()
            mx.eval(model.decoder(token, adapters=pool.rows([row])))
            load_seconds.append(loaded - began)
            use_seconds.append(time.perf_counter() - loaded)
        others = [pool.acquire(f"a{number}") for number in range(8)]
        batch = mx.full((8, 1), 5)

        def forward(rows: list[int]) -> float:
            adapters = pool.rows(rows)
            began = time.perf_counter()
            mx.eval(model.decoder(batch, adapters=adapters))
            return time.perf_counter() - began

        same, mixed, none = [], [], []
        for _ in range(12):
            same.append(forward([others[0]] * 8))
            mixed.append(forward(others))
            none.append(forward([0] * 8))
    # The first makes the stacks, and its first use compiles; from the second on it is what a running worker pays.
    return [
        {
            "name": "adapter, rank 8: from disk into the stacks",
            "milliseconds": 1000 * statistics.median(load_seconds[1:]),
        },
        {"name": "adapter, rank 8: the first of a worker", "milliseconds": 1000 * load_seconds[0]},
        {"name": "first forward pass with it, one token", "milliseconds": 1000 * statistics.median(use_seconds[1:])},
        {"name": "8 rows, no adapter", "milliseconds": 1000 * statistics.median(none[2:])},
        {"name": "8 rows, one adapter", "milliseconds": 1000 * statistics.median(same[2:])},
        {"name": "8 rows, 8 adapters", "milliseconds": 1000 * statistics.median(mixed[2:])},
    ]


def serving(plan: Plan, folder: Path) -> Rows:
    """Gaps between the tokens of a stream, with and without a training run at the same time."""
    from engine.engine import Engine
    from stoker.contract import GenerateRequest, StreamToken, TrainRequest
    from stoker.contract.dataset import Example, TrainInput

    times: dict[str, list[float]] = {}
    lock = threading.Lock()

    def publish(entries: Sequence[tuple[str, Any]]) -> None:
        now = time.perf_counter()
        with lock:
            for job_id, entry in entries:
                if isinstance(entry, StreamToken):
                    times.setdefault(job_id, []).append(now)

    def gaps(name: str) -> list[float]:
        request = GenerateRequest(model="bench", prompt="t3 t4 t5 t6 t7 t8 t9 t10", max_tokens=plan.tokens)
        tickets = [engine.submit(f"{name}-{number}", request) for number in range(plan.streams)]
        for ticket in tickets:
            ticket.result(300)
        found = []
        for number in range(plan.streams):
            # The first tokens are those of a batch that fills up.
            moments = times[f"{name}-{number}"][4:]
            found += [later - earlier for earlier, later in itertools.pairwise(moments)]
        return sorted(found)

    rows, length = plan.micro_step
    text = " ".join(f"t{index}" for index in range(3, 3 + length))
    data = TrainInput("\n".join([Example("", text).to_line()] * rows).encode())
    with tempfile.TemporaryDirectory() as home:
        engine = Engine({"bench": [str(folder)]}, adapters=Path(home) / "adapters", publish=publish)
        engine.start()
        try:
            gaps("warm")
            alone = gaps("alone")
            run = engine.submit(
                "run",
                TrainRequest(
                    model="bench", name="a", dataset="d", steps=100_000, batch_size=rows, spike=0, max_length=length + 1
                ),
                data,
            )
            gaps("warm-up")
            during = gaps("during")
            run.cancel()
        finally:
            engine.stop(60)
    found_rows: Rows = []
    for name, found in (("alone", alone), ("during a run", during)):
        found_rows.append(
            {
                "name": f"gap between tokens, {plan.streams} streams, {name}",
                "p50_milliseconds": 1000 * found[len(found) // 2],
                "p95_milliseconds": 1000 * found[int(len(found) * 0.95)],
                "longest_milliseconds": 1000 * found[-1],
            }
        )
    ours, both = (row["p95_milliseconds"] for row in found_rows)
    found_rows.append({"name": "p95, during a run / alone", "ratio": both / ours})
    return found_rows


def guarded(name: str, part: Callable[[], Rows]) -> Rows:
    """A part that fails is a row that says so, and the others still run."""
    began = time.perf_counter()
    try:
        rows = part()
    except Exception as error:
        traceback.print_exc()
        rows = [{"name": name, "error": f"{type(error).__name__}: {error}"}]
    for row in rows:
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))
        print(f"{row['name']:62} {numbers}{row.get('error', '')}", flush=True)
    print(f"({name}: {time.perf_counter() - began:.0f} s)\n", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.train", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the plan for a GPU; the peer runs in this very environment")
    parser.add_argument("--plan", choices=list(PLANS), help="another plan")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for train.json, or train-gpu.json")
    options = parser.parse_args(arguments)
    plan = PLANS[options.plan or ("gpu" if options.gpu else "cpu")]
    peer = PEERS if PEERS.exists() and not options.gpu else Path(sys.executable)
    device = probe.device()
    record = Record(f"train{'-gpu' if options.gpu else ''}", options.out, device=device, rows=[])
    print(f"{device}, MLX {record.fields['mlx']}\n")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        shapes.write(folder, plan.shape, plan.dtype)
        mx.clear_cache()
        parts: dict[str, Callable[[], Rows]] = {
            "training": lambda: steps(plan, folder, peer),
            "loading": lambda: loading(plan, folder),
            "serving": lambda: serving(plan, folder),
        }
        for name, part in parts.items():
            record.keep(rows=record.fields["rows"] + guarded(name, part))
    print(f"rows in {record.path}")
    return 1 if any("error" in row for row in record.fields["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
