"""A worker of two ranks and one of one, by turns, on random weights: `python -m bench.fleet` on a CPU, `python -m
bench.fleet --gpu` on a machine with two GPUs. `--tiny` tries the whole with a small model.

Training: both sides make the same steps, of as many micro-batches as there are ranks. Generation: one stream of a model
that the ranks share, by heads and by layers, by a worker's engine; and a run that trains on a model that they share.
One rank is the path without a group. What a group costs where it has one rank (`--group` on a single host) is measured
with a small model, whose steps hide least of it, in seconds of the CPU.

Each rank is a process; that of rank 0 (`bench.fleet_rank`) makes a step, or a stream, for each line on standard input.
On a CPU two ranks have half of the cores each, so that both sides have the same machine; a rank on a GPU sees no other
one. They find each other as `mlx.launch` would have it: over the ring and loopback, or NCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import Record, Row, against, by_turns, parser, row
from workers.group.starting import LOOPBACK, free_ports

RANKS = 2
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """Shapes are those of `bench.shapes`; of a micro-batch `batch` × `length` tokens, of a stream `tokens`."""

    dtype: str
    shape: str
    batch: int
    length: int
    steps: int
    shared_shape: str
    #: Its heads do not divide by two: ranks share its layers.
    layered_shape: str
    #: Its heads do, and ranks train it together.
    trained_shape: str
    #: Training on a shared model: steps of a run, and runs.
    shared_steps: int
    shared_runs: int
    tokens: int
    streams: int
    warm: int
    lone_steps: int
    lone_runs: int
    gpu: bool = False


PLANS = {
    "gpu": Plan(
        "bfloat16",
        "qwen2.5-0.5b",
        8,
        512,
        24,
        "qwen2.5-7b",
        "smollm2-135m",
        "qwen2.5-0.5b",
        shared_steps=20,
        shared_runs=5,
        tokens=256,
        streams=8,
        warm=4,
        lone_steps=100,
        lone_runs=24,
        gpu=True,
    ),
    "cpu": Plan(
        "float32", "smollm2-135m", 1, 32, 12, "llama-160m", "smollm2-135m", "llama-160m", shared_steps=4, shared_runs=5,
        tokens=16, streams=6, warm=1, lone_steps=5, lone_runs=1000,
    ),
    "tiny": Plan(
        "float32", "tiny", 2, 16, 2, "tiny", "tiny", "tiny", shared_steps=2, shared_runs=2,
        tokens=8, streams=2, warm=1, lone_steps=4, lone_runs=2,
    ),
}  # fmt: skip


class Rank:
    """One process, `python -m COMMAND`."""

    #: What it said of itself before its first step.
    ready: dict[str, Any]

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, **env},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
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

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.wait()


def places(folder: Path, ranks: int, plan: Plan, *, met: bool = False) -> list[dict[str, str]]:
    """The environment of each rank: what `mlx.launch` sets, and its share of the machine. `met`: also for one."""
    cores = {"OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    own = [
        {**cores, "MLX_RANK": str(rank), **({"CUDA_VISIBLE_DEVICES": str(rank)} if plan.gpu else {})}
        for rank in range(ranks)
    ]
    if ranks == 1 and not met:
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
def started(commands: list[list[str]], envs: list[dict[str, str]]) -> Iterator[list[Rank]]:
    """Ranks, not yet ready."""
    found: list[Rank] = []
    try:
        for command, env in zip(commands, envs, strict=True):
            found.append(Rank(command, env))
        yield found
    finally:
        # Rank 0 first: it would say that it has lost the others.
        for rank in found:
            rank.kill()
        for rank in found:
            rank.wait()


@contextmanager
def trainers(folder: Path, ranks: int, plan: Plan) -> Iterator[list[Rank]]:
    command = ["bench.fleet_rank", "train", str(folder), str(ranks), json.dumps(asdict(plan))]
    with started([command] * ranks, places(folder, ranks, plan)) as found:
        for rank in found:
            rank.ready = rank.answer()
        yield found


@contextmanager
def lone(folder: Path, plan: Plan, *, grouped: bool) -> Iterator[Rank]:
    """A worker's engine of one rank, as a group or as none."""
    home = folder.parent / f"lone-{grouped}"
    home.mkdir()
    settings = {"STOKER_HOME": str(home), "STOKER_MODELS": f"bench-model={folder}", "STOKER_DTYPE": plan.dtype}
    settings |= {"STOKER_GROUP": "bench"} if grouped else {}
    (env,) = places(home, 1, plan, met=grouped)
    # Threads of the BLAS that wait for each other would take time of the CPU too.
    env |= {"OPENBLAS_NUM_THREADS": "1"}
    command = ["bench.fleet_rank", "runs", str(plan.lone_steps), json.dumps(asdict(plan))]
    with started([command], [{**settings, **env}]) as (first,):
        first.answer()
        yield first


@contextmanager
def engine(job: list[str], folder: Path, ranks: int, plan: Plan) -> Iterator[Rank]:
    """Rank 0 of a worker's engine whose model these ranks share. `job`: what it does, `serve`, or `runs` and steps."""
    home = folder.parent / f"home-{ranks}"
    home.mkdir()
    settings = {"STOKER_HOME": str(home), "STOKER_MODELS": f"bench-model={folder}", "STOKER_DTYPE": plan.dtype}
    if ranks > 1:
        settings |= {"STOKER_GROUP": "bench", "STOKER_SHARD": "true"}
    commands = [["bench.fleet_rank", *job, json.dumps(asdict(plan))], *[["workers.rank"]] * (ranks - 1)]
    envs = [{**settings, **env} for env in places(home, ranks, plan)]
    with started(commands, envs) as (first, *_):
        first.answer()
        yield first


def step(ranks: list[Rank]) -> dict[str, Any]:
    """A step on all of them; what rank 0 says of it. None begins before all are asked."""
    for rank in ranks:
        rank.ask()
    said, *_ = [rank.answer() for rank in ranks]
    return said


def training(plan: Plan, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and how far the losses of both sides are from each other."""
    with trainers(folder, 1, plan) as one, trainers(folder, RANKS, plan) as two:
        pairs = turns(partial(step, one), partial(step, two), plan.steps, plan.warm)
        sums = [1000 * seconds for seconds in two[0].ready["sums"]]
    tokens = plan.batch * plan.length * RANKS
    last_alone, last_shared = pairs[-1]
    facts = {
        "loss_difference": max(abs(alone["loss"] / shared["loss"] - 1) for alone, shared in pairs),
        "training_peak_bytes": [last_alone["peak"], last_shared["peak"]],
    }
    return [*compared("training", tokens, pairs), row("the sum of a step's gradient", "ms", sums)], facts


def serving(what: str, plan: Plan, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows, the bytes of a rank's weights, and of how many first tokens of a stream both sides chose the same."""
    with engine(["serve"], folder, 1, plan) as one, engine(["serve"], folder, RANKS, plan) as two:
        pairs = turns(partial(step, [one]), partial(step, [two]), plan.streams, plan.warm)
    alone, shared = pairs[-1]
    same = [ours == theirs for ours, theirs in zip(alone["ids"], shared["ids"], strict=True)]
    facts = {
        "weight_bytes": [alone["bytes"], shared["bytes"]],
        "serving_peak_bytes": [alone["peak"], shared["peak"]],
        "alike_tokens": same.index(False) if False in same else len(same),
    }
    return compared(what, plan.tokens - 1, pairs), {f"{what}: {name}": fact for name, fact in facts.items()}


def shared_training(what: str, plan: Plan, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows, how far the last losses of both sides are from each other, and the peak of a rank's memory in bytes."""
    job = ["runs", str(plan.shared_steps)]
    with engine(job, folder, 1, plan) as one, engine(job, folder, RANKS, plan) as two:
        pairs = turns(partial(step, [one]), partial(step, [two]), plan.shared_runs, 1)
    alone, shared = pairs[-1]
    facts = {
        "loss_difference": max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs),
        "peak_bytes": [alone["peak"], shared["peak"]],
    }
    tokens = plan.shared_steps * plan.batch * plan.length
    return compared(what, tokens, pairs), {f"{what}: {name}": fact for name, fact in facts.items()}


def one_host(plan: Plan, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and how far the losses of both sides are from each other."""
    with lone(folder, plan, grouped=False) as alone, lone(folder, plan, grouped=True) as grouped:
        pairs = turns(partial(step, [alone]), partial(step, [grouped]), plan.lone_runs, plan.warm)
    facts = {"lone_loss_difference": max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs)}
    alone_ms, grouped_ms = (
        [1000 * side["cpu_seconds"] / plan.lone_steps for side in sides] for sides in zip(*pairs, strict=True)
    )
    return against("one host, a step of the CPU in a group", "ms", grouped_ms, "no group", alone_ms), facts


def turns(
    one: Callable[[], dict[str, Any]], two: Callable[[], dict[str, Any]], rounds: int, warm: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    found = by_turns({"one": one, "two": two}, rounds, warm)
    return list(zip(found["one"], found["two"], strict=True))


def compared(what: str, tokens: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Row]:
    """What one rank and all of them made, `tokens` each time."""
    alone, shared = ([tokens / side["seconds"] for side in sides] for sides in zip(*pairs, strict=True))
    return against(f"{what}, {RANKS} ranks", "tokens/s", shared, "one rank", alone)


@dataclass(frozen=True)
class Part:
    """What it measures, with a model of which shape."""

    measure: Callable[[Plan, Path], tuple[list[Row], dict[str, Any]]]
    shape: Callable[[Plan], str]


PARTS = {
    "training": Part(training, lambda plan: plan.shape),
    "serving": Part(partial(serving, "one stream"), lambda plan: plan.shared_shape),
    "layers": Part(partial(serving, "one stream of shared layers"), lambda plan: plan.layered_shape),
    "shared-training": Part(partial(shared_training, "training on a shared model"), lambda plan: plan.trained_shape),
    "layers-training": Part(partial(shared_training, "training on shared layers"), lambda plan: plan.layered_shape),
    "one-host": Part(one_host, lambda _: "tiny"),
}


def main() -> None:
    import mlx.core as mx

    from bench import shapes

    made = parser(__doc__)
    made.add_argument("--gpu", action="store_true", help="on two GPUs")
    made.add_argument("--tiny", action="store_true", help="try the whole with a small model")
    made.add_argument("--only", choices=list(PARTS), action="append", help="one part; may be repeated")
    asked = made.parse_args()
    name = "tiny" if asked.tiny else "gpu" if asked.gpu else "cpu"
    plan = PLANS[name]
    parts = asked.only or list(PARTS)
    # One part alone has a file of its own: it leaves what was measured of the others.
    said = ["fleet", *([] if name == "cpu" else [name]), *(parts if len(parts) == 1 else [])]
    record = Record("-".join(said), asked.out, plan=asdict(plan))
    for part in (PARTS[name] for name in parts):
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home, "model")
            shapes.write(folder, part.shape(plan), getattr(mx, plan.dtype))
            # The GPUs are the ranks' from here on.
            mx.clear_cache()
            found, facts = part.measure(plan, folder)
        record.add(found)
        print(json.dumps(facts), flush=True)
        record.keep(**facts)
    print(record.path)


if __name__ == "__main__":
    main()
