"""The idle worker of the benchmarks still works: its engine has what a worker asks of one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.idle_engine import IdleEngine

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
