"""What a clock has no part in: launches, traces, bytes and commands of small models and jobs, in seconds, anywhere.

`python -m bench.counts` compares them with `bench/results/counts.json`, and fails where one grew by more than a fifth;
`python -m bench.counts --renew` writes that file anew. `make test` holds them too (`tests/bench/test_counts.py`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.report import RESULTS, Record, Row, parser, row
from bench.transitions import QUEUE, WORKER
from engine.platform import blas

#: Growth that is no accident.
GROWTH = 0.2
FILE = RESULTS / "counts.json"
RENEW = "`python -m bench.counts --renew` writes the file anew, if this is meant"
#: Streams at once and tokens of their prompts, one batch after the other, and tokens of each answer.
BATCHES, TOKENS, MODEL = ((1, 3), (2, 90), (4, 300)), 40, "bench"


def counted(home: Path) -> dict[str, float]:
    """All of them, by name; `home` is an empty folder."""
    return {**of_steps(), **of_a_model(home), **of_a_job(home)}


def of_steps() -> dict[str, float]:
    """A decode step of Qwen2.5-0.5B on a GPU, and a pass over prompts, counted from their graphs."""
    from bench.launches import a_prompt, launches, narrow_llama, of_a_step

    settings = {"1 row": (1, 0), "32 rows": (32, 0), "32 rows over 8 adapters": (32, 8)}
    steps = {f"launches of a step, {name}": of_a_step(*setting).total() for name, setting in settings.items()}
    sizes, llama = {"a chunk of 512 tokens": (1, 512), "16 prompts of 64 tokens": (16, 64)}, narrow_llama()
    prompts = {f"launches of {name}": launches(*a_prompt(llama, *size)).total() for name, size in sizes.items()}
    return {**steps, **prompts}


def of_a_model(home: Path) -> dict[str, float]:
    """The smallest model of `bench.shapes`, its streams, and a run that trains it."""
    import mlx.core as mx
    import numpy as np

    from bench import shapes
    from engine.checkpoints.loading import load
    from engine.training.checkpoint import Checkpoints
    from engine.training.data import TokenizedExample
    from engine.training.trainer import Trainer
    from stoker.contract import TrainRequest

    shapes.write(home / "model", "tiny", mx.float32)
    model = load(MODEL, [str(home / "model")])
    request = TrainRequest(model=MODEL, name="a", dataset="none", steps=1, batch_size=1)
    trainer = Trainer(model.decoder, request, [TokenizedExample(np.arange(3, 20), np.arange(17) > 0)])
    for _ in trainer.run():
        pass
    checkpoints = Checkpoints(home / "checkpoints", {"model": MODEL})
    checkpoints.save(trainer.whole, trainer.adapter())
    return {
        "bytes of the weights": model.bytes,
        "bytes of a token's keys and values": model.decoder.kv_sizes.token_bytes,
        "bytes of a run's checkpoint": sum(file.stat().st_size for file in (home / "checkpoints").rglob("*.*")),
        "passes traced for three batches": traced(model, home),
    }


def traced(model: Any, home: Path) -> int:
    """Passes and parts that were compiled for streams of several lengths."""
    from engine.adapters.pool import AdapterPool
    from engine.adapters.store import AdapterStore
    from engine.generation.lane import GenerateLane
    from engine.ticket import Ticket
    from stoker.contract import GenerateRequest, GenerateResult

    lane = GenerateLane(model, AdapterPool(model, AdapterStore(home / "adapters")))
    for streams, length in BATCHES:
        request = GenerateRequest(
            model=MODEL, prompt_ids=tuple(range(3, 3 + length)), max_tokens=TOKENS, ignore_eos=True, lookup=False
        )
        for number in range(streams):
            ticket: Ticket[GenerateResult] = Ticket(f"{length}-{number}", "generate")
            lane.admit(lane.prepare(ticket, request, None))
        while lane.busy:
            lane.run()
    return int(lane.step.traced)


def of_a_job(home: Path) -> dict[str, float]:
    """What a broker runs for a job that is sent, claimed and completed, what its scripts call included."""
    from stoker.broker import keys, ledger
    from stoker.broker.connection import connect
    from stoker.client.requests import generate_request
    from stoker.client.submission import job_record
    from stoker.local.broker import EmbeddedBroker
    from stoker.settings import load_settings

    broker = EmbeddedBroker(load_settings(home=home), port=0)
    try:
        with closing(connect(load_settings(home=home, url=broker.start()), loads_functions=True)) as redis:
            # The first one sends the library, which no later one does.
            for number in ("warm", "job"):
                redis.config_resetstat()
                record = job_record(generate_request(MODEL, "x", 0, {"max_tokens": 1}), number)
                ledger.submission(number, record).on(redis)
                redis.rpop(keys.ready(QUEUE))
                ledger.claim(redis, number, QUEUE, "one", "tag", WORKER)
                ledger.complete(redis, number, QUEUE, "one", ledger.success(number, {}))
            stats = redis.info("commandstats")
            return {"commands of a job at the broker": sum(each["calls"] for each in stats.values())}
    finally:
        broker.stop()


def problems(found: Mapping[str, float], committed: Mapping[str, float]) -> list[str]:
    """What grew by more than a fifth, is new, or is gone, each in words."""
    said = [
        f"{name}: {committed[name]:,g} before, {value:,g} now"
        for name, value in found.items()
        if name in committed and value > (1 + GROWTH) * committed[name]
    ]
    said += [f"{name}: not in {FILE.name} yet" for name in found if name not in committed]
    return said + [f"{name}: in {FILE.name}, and counted no more" for name in committed if name not in found]


def committed() -> dict[str, float]:
    return {entry["name"]: entry["p50"] for entry in json.loads(FILE.read_text("utf-8"))["rows"]}


def rows(found: Mapping[str, float]) -> list[Row]:
    return [row(name, name.partition(" ")[0], [value]) for name, value in found.items()]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--renew", action="store_true", help="write the committed file anew")
    options = made.parse_args()
    blas.boot()
    before = committed() if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        found = counted(Path(home))
    if options.renew or options.out != RESULTS:
        Record("counts", options.out).add(rows(found))
    said = [] if options.renew else problems(found, before)
    for problem in said:
        print(problem, file=sys.stderr)
    print("counts are as they were, or less" if not said else RENEW)
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
