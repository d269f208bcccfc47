"""The idle worker of the benchmarks still works: its engine has what a worker asks of one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.idle_engine import IdleEngine
from bench.idle_models import ENCODER, MODEL
from bench.queue import Bench
from stoker import Client
from stoker.client.requests import generate_request
from stoker.errors import JobCancelled

WORKERS = Path(__file__).parents[2] / "workers"
#: What runs in every worker.
ALWAYS = ("services/presence", "services/measuring", "services/runtime", "services/watchdog", "celery/boot")


@pytest.mark.parametrize("name", ALWAYS)
def test_the_idle_engine_has_what_a_worker_asks_of_one(name: str) -> None:
    """A worker without it is never there, and the benchmarks of queue and gateway waited for it."""
    asked = set(re.findall(r"(?<!from )\bengine\.(\w+)\b(?! =)", (WORKERS / f"{name}.py").read_text("utf-8")))
    asked = {word for word in asked if not (WORKERS.parent / "engine" / word).exists()} - {"engine"}
    assert asked
    assert {word for word in asked if not hasattr(IdleEngine(lambda _: None), word)} == set()


def test_a_stream_of_the_idle_engine_that_is_cancelled_ends_before_its_next_entry() -> None:
    """Which is a minute away here."""
    engine = IdleEngine(lambda _: None)
    engine.start()
    ticket = engine.submit("job", generate_request(MODEL, "x", 0, {"max_tokens": 2, "top_k": 1200}))
    ticket.cancel()
    with pytest.raises(JobCancelled):
        ticket.result(10)


def test_the_idle_worker_ends_a_job_of_each_kind(tmp_path: Path) -> None:
    """The benchmarks of the queue and of the gateway are nothing else: where it fails they have no row."""
    bench = Bench(tmp_path)
    try:
        with bench.worker(rate=1000.0), Client(settings=bench.settings) as client:
            assert client.generate("x", model=MODEL, max_tokens=1).result(30).usage.completion_tokens == 1
            assert client.generate("x", model=MODEL, max_tokens=3).result(30).usage.completion_tokens == 3
            assert len(client.embed(["x"], model=ENCODER).result(30)) == 1
    finally:
        bench.close()
