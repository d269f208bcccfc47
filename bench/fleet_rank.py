"""A rank of `bench.fleet`, as a process with MLX's variables: `python -m bench.fleet_rank train FOLDER RANKS PLAN`, or
rank 0 of a worker's engine with the settings of the environment: `python -m bench.fleet_rank serve PLAN`, or `runs
STEPS PLAN` for one that trains.

It makes a step, or a stream, for each line on standard input, and says on standard output what it was: a JSON object a
line.
"""

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

from bench.training_steps import answer_steps, examples  # noqa: E402
from engine.checkpoints.loading import load  # noqa: E402
from engine.training.ranks import ALONE, MlxRanks, Ranks  # noqa: E402
from engine.training.trainer import Trainer  # noqa: E402
from stoker.contract import GenerateRequest, TrainRequest  # noqa: E402
from stoker.contract.dataset import TrainInput  # noqa: E402
from stoker.settings import load_settings  # noqa: E402
from workers.group.starting import place_of  # noqa: E402
from workers.machine import make_engine  # noqa: E402

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
    model = load("bench", [str(folder)])
    shared = examples(folder, plan["batch"] * accumulation, plan["length"])
    trainer = Trainer(model.decoder, request, shared, ranks=ranks)
    answer_steps(trainer.run(), answer, {"sums": sums(ranks, trainer.layout.size)})


def sums(ranks: Ranks, numbers: int, times: int = 50) -> list[float]:
    """The seconds of a sum over all ranks of as many numbers as a step's gradient has, while nothing else is done."""
    gradient, found = mx.random.normal((numbers,)), []
    mx.eval(gradient)
    for _ in range(times):
        # They begin together.
        ranks.sum(mx.zeros(1))
        began = time.perf_counter()
        ranks.sum(gradient)
        found.append(time.perf_counter() - began)
    return found


def serve(plan: dict[str, Any]) -> None:
    """One stream after the other; the seconds from its first token to its last."""
    came: list[float] = []

    def publish(entries: list[Any]) -> None:
        came.extend([time.perf_counter()] * len(entries))

    engine = make_engine(load_settings(), publish, lambda: os._exit(1))
    engine.start()
    mx.reset_peak_memory()
    answer(ready=True)
    prompt = tuple(range(3, 3 + 64))
    for number, _ in enumerate(sys.stdin):
        came.clear()
        request = GenerateRequest(
            model="bench-model", prompt_ids=prompt, max_tokens=plan["tokens"], ignore_eos=True, lookup=False
        )
        result = engine.submit(str(number), request).result(600)
        answer(
            seconds=came[-1] - came[0],
            ids=result.token_ids,
            bytes=engine.model("bench-model").bytes,
            peak=int(mx.get_peak_memory()),
        )


def runs(steps: int, plan: dict[str, Any]) -> None:
    """One training run after the other; its seconds, and those of the CPU that this process took for it, all threads
    together."""
    engine = make_engine(load_settings(), lambda entries: None, lambda: os._exit(1))
    engine.start()
    lines = "".join(json.dumps({"text": "t7 " * plan["length"]}) + "\n" for _ in range(plan["batch"]))
    mx.reset_peak_memory()
    answer(ready=True)
    for number, _ in enumerate(sys.stdin):
        began, busy = time.perf_counter(), time.process_time()
        request = TrainRequest(
            model="bench-model", name="bench", dataset="dataset:bench", steps=steps, rank=LORA_RANK,
            batch_size=plan["batch"],
        )  # fmt: skip
        result = engine.submit(f"run-{number}", request, TrainInput(lines.encode())).result(600)
        answer(
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - busy,
            loss=result.last_loss,
            peak=int(mx.get_peak_memory()),
        )


if __name__ == "__main__":
    _, job, *given, said = sys.argv
    plan = json.loads(said)
    if job == "train":
        where, count = given
        train(Path(where), int(count), plan)
    elif job == "runs":
        runs(int(*given), plan)
    else:
        serve(plan)
