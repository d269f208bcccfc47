"""LoRA training and mlx-lm's trainer, step by step in one run; adapters from disk to first use; decode during a run.

`python -m bench.train` on a CPU (with the peers' environment of `make peers`), `python -m bench.train --gpu`
on a GPU. Weights are random, the same for both sides; every step sees the same tokens.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.platform import blas

blas.boot()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from bench import shapes  # noqa: E402
from bench.report import Record, Row, against, by_turns, parser, ratio, row  # noqa: E402
from engine.platform import heap, probe  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"


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
    #: Of streams alone and during a run.
    rounds: int = 3


#: Adapters that are loaded one after the other. The stacks grow for three of them.
LOADED = 24
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


def steps(plan: Plan, folder: Path, peer: Path) -> list[Row]:
    """Both sides step by step: what the machine does otherwise meets both alike."""
    sides = {
        name: Side(name, python, folder, plan) for name, python in (("stoker", Path(sys.executable)), ("mlx-lm", peer))
    }
    try:
        for side in sides.values():
            side.answer()
        found = by_turns({name: side.step for name, side in sides.items()}, plan.warm + plan.steps, warm=0)
    finally:
        for side in sides.values():
            side.end()
    ours, theirs = found["stoker"], found["mlx-lm"]
    tokens = plan.batch * plan.length
    rates = [[tokens / answer["seconds"] for answer in answers[plan.warm :]] for answers in (ours, theirs)]
    peaks = [[answers[-1]["peak"] / 1e9] for answers in (ours, theirs)]
    return [
        *against("tokens of a step", "tokens/s", rates[0], "mlx-lm", rates[1]),
        *against("peak memory", "GB", peaks[0], "mlx-lm", peaks[1]),
        # Later ones differ by the adapters' random beginnings.
        row("difference of the first losses", "", [abs(ours[0]["loss"] - theirs[0]["loss"])]),
    ]


def loading(plan: Plan, folder: Path) -> list[Row]:
    """Adapters of rank 8 from disk to the first hidden states that they changed, and what a row of them costs."""
    from engine.adapters.lora import LoraConfig, initialise
    from engine.adapters.pool import AdapterPool
    from engine.adapters.store import AdapterStore
    from engine.checkpoints.loading import load

    # As an engine has it.
    heap.arrange()
    model = load("bench", [str(folder)])
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    token = mx.array([[5]])
    with tempfile.TemporaryDirectory() as home:
        store = AdapterStore(Path(home))
        for number in range(LOADED):
            store.write(
                "bench", f"a{number}", initialise(LoraConfig(8, 16.0, targets), model.linear_shapes, number), {}
            )
        pool = AdapterPool(model, store)
        load_seconds, use_seconds = [], []
        for number in range(LOADED):
            began = time.perf_counter()
            index = pool.acquire(f"a{number}")
            loaded = time.perf_counter()
            mx.eval(model.decoder(token, adapters=pool.rows([index])))
            load_seconds.append(1000 * (loaded - began))
            use_seconds.append(1000 * (time.perf_counter() - loaded))
        others = [pool.acquire(f"a{number}") for number in range(8)]
        batch = mx.full((8, 1), 5)

        def forward(rows: list[int]) -> float:
            adapters = pool.rows(rows)
            began = time.perf_counter()
            mx.eval(model.decoder(batch, adapters=adapters))
            return 1000 * (time.perf_counter() - began)

        ways = {"8 adapters": others, "one adapter": [others[0]] * 8, "none": [0] * 8}
        found = by_turns({name: partial(forward, rows) for name, rows in ways.items()}, 12, warm=2)
    # The first makes the stacks, and its first use compiles; from the second on it is what a running worker pays.
    return [
        row("adapter of rank 8, from disk into the stacks", "ms", load_seconds[1:]),
        row("adapter of rank 8, the first of a worker", "ms", load_seconds[:1]),
        row("adapter of rank 8, one for which the stacks grow, at most", "ms", [max(load_seconds[1:])]),
        row("first forward pass with it, one token", "ms", use_seconds[1:]),
        *(row(f"a pass of 8 rows, {name}", "ms", samples) for name, samples in found.items()),
        *(ratio(f"a pass of 8 rows over 8 adapters, against {name}", found["8 adapters"], found[name])
          for name in ("one adapter", "none")),
    ]  # fmt: skip


def serving(plan: Plan, folder: Path) -> list[Row]:
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

    def gaps() -> list[float]:
        """Milliseconds between two tokens."""
        name = f"stream-{len(times)}"
        # Without drafts, whose tokens come at the same time.
        request = GenerateRequest(
            model="bench", prompt="t3 t4 t5 t6 t7 t8 t9 t10", max_tokens=plan.tokens, ignore_eos=True, lookup=False
        )
        tickets = [engine.submit(f"{name}-{number}", request) for number in range(plan.streams)]
        for ticket in tickets:
            ticket.result(300)
        # The first tokens are those of a batch that fills up.
        moments = [times[f"{name}-{number}"][4:] for number in range(plan.streams)]
        return [1000 * (later - earlier) for each in moments for earlier, later in itertools.pairwise(each)]

    def during() -> list[float]:
        name = f"run-{len(times)}"
        request = TrainRequest(
            model="bench", name="a", dataset="d", steps=100_000, batch_size=rows, spike=0, max_length=length + 1
        )
        run = engine.submit(name, request, data)
        try:
            gaps()
            return gaps()
        finally:
            run.cancel()
            run.wait(60)

    rows, length = plan.micro_step
    text = " ".join(f"t{index}" for index in range(3, 3 + length))
    data = TrainInput("\n".join([Example("", text).to_line()] * rows).encode())
    with tempfile.TemporaryDirectory() as home:
        engine = Engine({"bench": [str(folder)]}, adapters=Path(home) / "adapters", publish=publish)
        engine.start()
        try:
            gaps()
            found = by_turns({"alone": gaps, "during": during}, plan.rounds, warm=0)
        finally:
            engine.stop(60)
    made: list[Row] = []
    for name, part in (("p50", 50), ("p95", 95), ("longest time", 100)):
        sides = [[float(np.percentile(each, part)) for each in found[side]] for side in ("during", "alone")]
        made += against(f"{name} between tokens during a run", "ms", sides[0], "alone", sides[1])
    return made


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--gpu", action="store_true", help="the plan for a GPU; the peer runs in this very environment")
    made.add_argument("--plan", choices=list(PLANS), help="another plan")
    options = made.parse_args()
    plan = PLANS[options.plan or ("gpu" if options.gpu else "cpu")]
    if options.quick:
        plan = replace(plan, steps=max(2, plan.steps // 3), tokens=plan.tokens // 2, rounds=2)
    peer = PEERS if PEERS.exists() and not options.gpu else Path(sys.executable)
    device = probe.device()
    described = f"{plan.shape}, {plan.batch} x {plan.length} tokens a step"
    record = Record(f"train{'-gpu' if options.gpu else ''}", options.out, device=device, model=described)
    print(f"{device}, MLX {record.fields['mlx']}, {described}\n")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        shapes.write(folder, plan.shape, plan.dtype)
        mx.clear_cache()
        record.part("training", lambda: steps(plan, folder, peer))
        record.part("loading", lambda: loading(plan, folder))
        record.part("serving", lambda: serving(plan, folder))
    print(f"rows in {record.path}")
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
