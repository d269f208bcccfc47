"""A worker's engine whose model is shared by ranks: `python -m tests.workers.group.sharded_child HOME MODEL RANKS`.

The last line that it prints is what `scenario` found, as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.contract import GenerateRequest, StreamToken
from stoker.errors import JobCancelled
from stoker.settings import load_settings
from workers.machine import make_engine

if TYPE_CHECKING:
    from engine.engine import Engine

NAME = "tiny"
#: Long enough for the prefix cache.
PROMPT = tuple(3 + n * 7 % 20 for n in range(40))


class Streams:
    """What an engine publishes: token ids by job, as they come."""

    def __init__(self) -> None:
        self.found: defaultdict[str, list[StreamToken]] = defaultdict(list)
        self.changed = threading.Condition()

    def publish(self, entries: list[Any]) -> None:
        with self.changed:
            for job, entry in entries:
                self.found[job].append(entry)
            self.changed.notify_all()

    def ids(self, job: str) -> list[int]:
        return [token.token_id for token in self.found[job]]


def asking(**options: Any) -> GenerateRequest:
    fields = {"model": NAME, "prompt_ids": PROMPT, "max_tokens": 12, "ignore_eos": True}
    return GenerateRequest(**{**fields, **options})


REQUESTS = {
    "greedy": asking(),
    "seeded": asking(temperature=1.0, seed=7, top_p=0.9, max_tokens=20),
    "penalised": asking(temperature=0.7, seed=1, presence_penalty=0.5, n=2),
    "plain-adapter": asking(adapter="first", temperature=0.9, seed=3),
    "another-adapter": asking(adapter="second@1"),
    "short": asking(prompt_ids=(5, 9)),
    "stopped": asking(ignore_eos=False, stop_token_ids=(11,), temperature=1.2, seed=5),
}


def scenario(engine: Engine, streams: Streams) -> dict[str, Any]:
    """Jobs of all kinds in one batch, one that is cancelled, one that goes on from elsewhere, one that finds its
    prompt; and what the weights take."""
    tickets = {name: engine.submit(name, request) for name, request in REQUESTS.items()}
    endless = engine.submit("endless", asking(max_tokens=3000))
    with streams.changed:
        assert streams.changed.wait_for(lambda: len(streams.found["endless"]) > 4, 30)
    endless.cancel()
    engine.wake()
    with suppress(JobCancelled):
        endless.result(30)
    results = {name: ticket.result(30) for name, ticket in tickets.items()}
    resumed = engine.submit("resumed", REQUESTS["seeded"], streams.found["seeded"][:9])
    again = engine.submit("again", asking()).result(30)
    made = {name: [list(one.token_ids) for one in (result, *result.others)] for name, result in results.items()}
    return {
        "made": made | {"resumed": [list(resumed.result(30).token_ids)], "again": [list(again.token_ids)]},
        "cached": again.usage.cached_tokens,
        "endless": streams.ids("endless"),
        "cancelled": type(endless.error).__name__,
        "bytes": engine.model(NAME).bytes,
        "parameters": engine.model(NAME).parameters,
    }


def main(home: Path, model: Path, ranks: int) -> None:
    settings = load_settings(
        home=home, models=(f"{NAME}={model}",), ranks=ranks, shard=True, step_limit=60.0, log_level="error"
    )
    streams = Streams()
    engine = make_engine(settings, streams.publish, lambda: None)
    engine.start()
    try:
        found = scenario(engine, streams)
    finally:
        engine.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
