"""A worker's engine whose models are shared by ranks: `python -m tests.workers.group.sharded_child HOME FOLDER RANKS
MODEL…`.

`FOLDER` has the models, of those in `MODELS`. The last line that it prints is what `everything` found, as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.contract import GenerateRequest, StreamToken, TrainReport, TrainRequest
from stoker.contract.dataset import TrainInput
from stoker.contract.requests import DEFAULT_TARGETS
from stoker.errors import JobCancelled, WorkerUnavailable
from stoker.settings import load_settings
from workers.machine import make_engine

if TYPE_CHECKING:
    from engine.engine import Engine

#: The first is shared by its heads, the others by their layers; the last runs a file of mlx-lm.
MODELS = ("tiny", "odd", "recurrent")
#: Seconds that a job may take: three ranks have a core each on few machines, and a token has a dozen exchanges.
PATIENCE = 240
#: Tokens of a stream that is cancelled before it has them, on any machine; and those of one next to a run that are
#: compared.
ENDLESS, COMPARED = 3000, 60
#: Long enough for the prefix cache.
PROMPT = tuple(3 + n * 7 % 20 for n in range(40))


class Streams:
    """What an engine publishes: token ids by job, as they come."""

    def __init__(self) -> None:
        self.found: defaultdict[str, list[StreamToken]] = defaultdict(list)
        #: Job → index → report: a run that goes on says again what it said.
        self.reports: defaultdict[str, dict[int, TrainReport]] = defaultdict(dict)
        self.hears: Callable[[str, TrainReport], None] = lambda job, report: None
        self.changed = threading.Condition()

    def publish(self, entries: list[Any]) -> None:
        with self.changed:
            for job, entry in entries:
                if isinstance(entry, TrainReport):
                    self.reports[job][entry.index] = entry
                    self.hears(job, entry)
                else:
                    self.found[job].append(entry)
            self.changed.notify_all()

    def ids(self, job: str) -> list[int]:
        return [token.token_id for token in self.found[job]]


def asking(model: str, **options: Any) -> GenerateRequest:
    fields = {"model": model, "prompt_ids": PROMPT, "max_tokens": 12, "ignore_eos": True}
    return GenerateRequest(**{**fields, **options})


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "max_tokens": 20},
    "penalised": {"temperature": 0.7, "seed": 1, "presence_penalty": 0.5, "n": 2},
    "plain-adapter": {"adapter": "first", "temperature": 0.9, "seed": 3},
    "another-adapter": {"adapter": "second@1"},
    "adapter-of-one-layer": {"adapter": "last", "temperature": 0.9, "seed": 3},
    "dora": {"adapter": "normed"},
    "short": {"prompt_ids": (5, 9)},
    # Its prompt takes several chunks, of which all except the last choose no token.
    "long": {"prompt_ids": PROMPT * 20, "max_tokens": 4},
    "stopped": {"ignore_eos": False, "stop_token_ids": (11,), "temperature": 1.2, "seed": 5},
}


def scenario(engine: Engine, streams: Streams, model: str) -> dict[str, Any]:
    """Jobs of all kinds in one batch, one that is cancelled, one that goes on from elsewhere, one that finds its
    prompt; and what the weights take."""

    requests = {name: asking(model, **options) for name, options in REQUESTS.items()}
    tickets = {name: engine.submit(name, request) for name, request in requests.items()}
    endless = engine.submit("endless", asking(model, max_tokens=ENDLESS))
    with streams.changed:
        assert streams.changed.wait_for(lambda: len(streams.found["endless"]) > 4, PATIENCE)
    endless.cancel()
    engine.wake()
    with suppress(JobCancelled):
        endless.result(PATIENCE)
    results = {name: ticket.result(PATIENCE) for name, ticket in tickets.items()}
    resumed = engine.submit("resumed", requests["seeded"], streams.found["seeded"][:9])
    again = engine.submit("again", asking(model, prompt_ids=(*PROMPT, 9))).result(PATIENCE)
    made = {name: [list(one.token_ids) for one in (result, *result.others)] for name, result in results.items()}
    return {
        "made": made | {"resumed": [list(resumed.result(PATIENCE).token_ids)], "again": [list(again.token_ids)]},
        "cached": again.usage.cached_tokens,
        "endless": streams.ids("endless"),
        "cancelled": type(endless.error).__name__,
        "bytes": engine.model(model).bytes,
        "parameters": engine.model(model).parameters,
        "shared": engine.shares(model),
    }


def scenarios(engine: Engine, streams: Streams, models: Sequence[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for model in models:
        streams.found.clear()
        found[model] = scenario(engine, streams, model)
    return found


RUN: dict[str, Any] = {
    "model": MODELS[0], "name": "style", "dataset": "dataset:x", "steps": 6, "batch_size": 2, "accumulation": 2,
    "rank": 4, "dora": True, "dropout": 0.2, "held_out": 0.25, "eval_every": 2, "checkpoint_every": 3,
    "learning_rate": 1e-2, "clip": 0.5, "targets": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "max_length": 64,
}  # fmt: skip
LINES = b"\n".join(
    json.dumps({"text": " ".join(f"t{3 + n * m % 50}" for m in range(1, 6 + n % 5))}).encode() for n in range(1, 13)
)


def training(engine: Engine, streams: Streams) -> dict[str, Any]:
    """Next to a stream: `begun`, a run that may have been left by others; `left`, one that is left in its middle; one
    that is cancelled. Then what the adapter of the first one writes."""
    # How many tokens come before a run's first report hangs on the machine: the stream lasts until there is one.
    stream = engine.submit("next to it", asking(MODELS[0], max_tokens=ENDLESS, temperature=1.0, seed=2))
    with streams.changed:
        # One that is cancelled must not come to its end before.
        steps = {"left": {}, "gone": {"steps": 1000}, "begun": {}}
        submitted = {
            job: engine.submit(job, TrainRequest(**RUN | own), TrainInput(LINES)) for job, own in steps.items()
        }

        tokens_before = list[int]()

        def stop_others(job: str, report: TrainReport) -> None:
            tokens_before.append(len(streams.found["next to it"]))
            if tokens_before[-1] >= COMPARED:
                stream.cancel()
            # A step of `left` is under way by then; where no other run had a turn meanwhile, one is behind it.
            if 1 in streams.reports["left"] and (job != "left" or len(streams.reports["left"]) > 1):
                submitted["left"].cancel(WorkerUnavailable("the worker drains."))
                submitted["gone"].cancel()

        streams.hears = stop_others
    result = submitted["begun"].result(PATIENCE)
    for job in ("left", "gone"):
        with suppress(WorkerUnavailable, JobCancelled):
            submitted[job].result(PATIENCE)
    with streams.changed:
        assert streams.changed.wait_for(lambda: len(streams.found["next to it"]) >= COMPARED, PATIENCE)
    stream.cancel()
    engine.wake()
    with suppress(JobCancelled):
        stream.result(PATIENCE)
    written = engine.submit("written", asking(MODELS[0], adapter=f"style@{result.version}", max_tokens=20)).result(
        PATIENCE
    )
    return {
        "losses": losses(streams, "begun"),
        "ended": {job: type(ticket.error).__name__ for job, ticket in submitted.items()},
        "stream": streams.ids("next to it")[:COMPARED],
        "alternated": tokens_before[0] < ENDLESS,
        "written": list(written.token_ids),
    }


def training_on_layers(engine: Engine, streams: Streams, model: str) -> dict[str, Any]:
    """A run next to a stream, and what its adapter writes, of a model whose layers ranks share."""
    streams.reports.clear()
    stream = engine.submit("next to layers", asking(model, max_tokens=40, temperature=1.0, seed=2))
    request = TrainRequest(**RUN | {"model": model, "steps": 3, "targets": DEFAULT_TARGETS})
    result = engine.submit("layered", request, TrainInput(LINES)).result(PATIENCE)
    adapter = f"style@{result.version}"
    written = engine.submit("written by layers", asking(model, adapter=adapter, max_tokens=20)).result(PATIENCE)
    return {
        "losses": losses(streams, "layered"),
        "stream": list(stream.result(PATIENCE).token_ids),
        "written": list(written.token_ids),
    }


def losses(streams: Streams, job: str) -> list[list[float]]:
    """What each report of a run says that follows from its request."""
    return [
        [index, one.step, one.tokens, one.loss, one.gradient_norm, one.held_out_loss or 0.0]
        for index, one in sorted(streams.reports[job].items())
    ]


def everything(engine: Engine, streams: Streams, models: Sequence[str]) -> dict[str, Any]:
    """The streams of all models, and runs on them, on which nothing trains elsewhere."""
    found = scenarios(engine, streams, models)
    if MODELS[0] in models:
        found["training"] = training(engine, streams)
    for model in models:
        if model != MODELS[0]:
            found[f"training on {model}"] = training_on_layers(engine, streams, model)
    return found


def main(home: Path, folder: Path, ranks: int, names: Sequence[str]) -> None:
    models = tuple(f"{name}={folder / name}" for name in names)
    settings = load_settings(home=home, models=models, ranks=ranks, shard=True, step_limit=60.0, log_level="error")
    streams = Streams()
    engine = make_engine(settings, streams.publish, lambda: None)
    engine.start()
    try:
        found = everything(engine, streams, names)
    finally:
        engine.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
