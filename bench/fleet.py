"""A worker of two ranks and one of one, by turns, on random weights: `python -m bench.fleet` on a CPU, `python -m
bench.fleet --gpu --out DIR` on a machine with two GPUs. `--tiny` tries the whole with a small model.

Training: both sides make the same steps, of as many micro-batches as there are ranks. One rank is the path without a
group.

Each rank is a process (`python -m bench.fleet_rank`) that makes a step for each line on standard input. On a CPU two
ranks have half of the cores each, so that both sides have the same machine; a rank on a GPU sees no other one. They
find each other as `mlx.launch` would have it: over the ring and loopback, or NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.report import RESULTS, Record, Row, row, show
from workers.group.starting import LOOPBACK, free_ports

RANKS = 2
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """`shape`: of `bench.shapes`; `batch` × `length` tokens are a micro-batch."""

    shape: str
    dtype: str
    batch: int
    length: int
    warm: int
    rounds: int
    gpu: bool = False


PLANS = {
    "gpu": Plan("qwen2.5-0.5b", "bfloat16", 8, 512, warm=4, rounds=24, gpu=True),
    "cpu": Plan("smollm2-135m", "float32", 1, 32, warm=1, rounds=12),
    "tiny": Plan("tiny", "float32", 2, 16, warm=1, rounds=2),
}


class Rank:
    """One process. It ends when its standard input does."""

    def __init__(self, arguments: list[str], env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "bench.fleet_rank", *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self) -> None:
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The next object on its standard output; MLX prints there too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"a rank ended with exit code {self._process.wait()}; see its output above")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def places(folder: Path, ranks: int, plan: Plan) -> list[dict[str, str]]:
    """The environment of each rank: what `mlx.launch` sets, and its share of the machine."""
    cores = {"OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    own = [
        {**cores, "MLX_RANK": str(rank), **({"CUDA_VISIBLE_DEVICES": str(rank)} if plan.gpu else {})}
        for rank in range(ranks)
    ]
    if ranks == 1:
        return own
    if plan.gpu:
        (port,) = free_ports(1)
        common = {"MLX_WORLD_SIZE": str(ranks), "NCCL_HOST_IP": LOOPBACK, "NCCL_PORT": str(port)}
    else:
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"{LOOPBACK}:{port}"] for port in free_ports(ranks)]), "utf-8")
        common = {"MLX_HOSTFILE": str(hosts)}
    return [{**common, **each} for each in own]


@contextmanager
def started(folder: Path, ranks: int, plan: Plan) -> Iterator[list[Rank]]:
    """Ranks that are ready."""
    with ExitStack() as leaving:
        found = []
        for env in places(folder, ranks, plan):
            rank = Rank(["train", str(folder), str(ranks), json.dumps(asdict(plan))], env)
            leaving.callback(rank.end)
            found.append(rank)
        for rank in found:
            rank.answer()
        yield found


def step(ranks: list[Rank]) -> dict[str, Any]:
    """A step on all of them; what rank 0 says of it. None begins before all are asked."""
    for rank in ranks:
        rank.ask()
    said, *_ = [rank.answer() for rank in ranks]
    return said


def training(plan: Plan, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and how far the losses of both sides are from each other."""
    with started(folder, 1, plan) as one, started(folder, RANKS, plan) as two:
        pairs = [(step(one), step(two)) for _ in range(plan.warm + plan.rounds)]
    tokens = plan.batch * plan.length * RANKS
    seconds = [(alone["seconds"], shared["seconds"]) for alone, shared in pairs[plan.warm :]]
    rows = [
        row("training tokens a second, one rank", "tokens/s", [tokens / alone for alone, _ in seconds]),
        row(f"training tokens a second, {RANKS} ranks", "tokens/s", [tokens / shared for _, shared in seconds]),
        row(f"training on {RANKS} ranks, as a multiple of one", "times", [alone / shared for alone, shared in seconds]),
    ]
    last_alone, last_shared = pairs[-1]
    facts = {
        "loss_difference": max(abs(alone["loss"] / shared["loss"] - 1) for alone, shared in pairs),
        "peak_bytes": [last_alone["peak"], last_shared["peak"]],
    }
    return rows, facts


def main() -> None:
    import mlx.core as mx

    from bench import shapes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on two GPUs")
    parser.add_argument("--tiny", action="store_true", help="try the whole with a small model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    asked = parser.parse_args()
    name = "tiny" if asked.tiny else "gpu" if asked.gpu else "cpu"
    plan = PLANS[name]
    record = Record("fleet" if name == "cpu" else f"fleet-{name}", asked.out, plan=asdict(plan))
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "model")
        shapes.write(folder, plan.shape, getattr(mx, plan.dtype))
        # The GPUs are the ranks' from here on.
        mx.clear_cache()
        rows, facts = training(plan, folder)
    show(rows)
    print(json.dumps(facts))
    record.keep(rows=[asdict(entry) for entry in rows], **facts)
    print(record.path)


if __name__ == "__main__":
    main()
