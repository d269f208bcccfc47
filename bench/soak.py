"""A long run at full load: random requests arrive and are cancelled; memory must stay flat and nothing may leak.

`python -m bench.soak --minutes 30`. The engine runs as a worker runs it, on the demo's model, with two adapters, every
sampler, grammars, deadlines, more requests than slots, and so little memory for keys and values that rows are put back.
Exits 1 if memory grew, or anything is held when all is over.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Row, row, write
from engine.platform import blas
from stoker.catalogue import CATALOGUE
from stoker.contract import GenerateRequest
from stoker.errors import DeadlineExceeded, JobCancelled

MODEL = "smollm2-135m-instruct"
SLOTS, LOAD = 8, 16
#: Growth of resident memory, from the end of the warm-up to the end, that counts as flat.
FLAT = 0.03
SYSTEM = "You are a stoker on a steam ship. You answer in few words and never let the fire go out. " * 3
SCHEMA = {"type": "object", "properties": {"coal": {"type": "integer"}}, "required": ["coal"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    blas.boot()
    with tempfile.TemporaryDirectory() as home:
        soak = Soak(Path(home))
        soak.run(60 * minutes)
        sys.exit(soak.report(minutes))


class Soak:
    def __init__(self, home: Path) -> None:
        from engine.engine import Engine
        from engine.generation.limits import LaneLimits

        self._chance = random.Random(0)
        self._ends: Counter[str] = Counter()
        self._tokens = 0
        self._open: list[Any] = []
        self._resident: list[float] = []
        self._active: list[float] = []
        limits = LaneLimits(slots=SLOTS, kv_bytes=128 << 20, stall=0.25)
        self._engine = Engine({MODEL: CATALOGUE[MODEL]}, adapters=home / "adapters", publish=self._count, limits=limits)
        self._engine.start()
        self._train(home)

    def _train(self, home: Path) -> None:
        """Two adapters, made by the engine itself."""
        from stoker.contract import TrainRequest
        from stoker.contract.dataset import TrainInput

        data = b'{"prompt": "Q: coal?", "completion": " Aye!"}'
        for name in ("one", "two"):
            request = TrainRequest(model=MODEL, name=name, dataset=name, steps=1, max_length=32)
            self._engine.submit(name, request, TrainInput(data)).result(600)

    def _count(self, entries: list[Any]) -> None:
        self._tokens += len(entries)

    def run(self, seconds: float) -> None:
        end, sample, number = time.monotonic() + seconds, 0.0, 0
        while time.monotonic() < end:
            while len(self._open) < LOAD:
                number += 1
                request, deadline = self._request(number), self._deadline()
                self._open.append(self._engine.submit(f"job-{number}", request, deadline=deadline))
            if self._chance.random() < 0.004:
                self._chance.choice(self._open).cancel()
                self._engine.wake()
            self._reap()
            if time.monotonic() >= sample:
                sample = time.monotonic() + max(0.2, seconds / 180)
                self._resident.append(_resident())
                self._active.append(self._engine.memory_bytes / 2**20)
            time.sleep(0.02)
        for ticket in self._open:
            ticket.cancel()
        self._engine.wake()
        while self._open:
            self._reap()
            time.sleep(0.02)

    def _deadline(self) -> float | None:
        return 5.0 if self._chance.random() < 0.05 else None

    def _request(self, number: int) -> GenerateRequest:
        chance = self._chance
        prompt = (SYSTEM if chance.random() < 0.5 else "") + "word " * chance.choice([1, 10, 50, 200]) + str(number)
        options: dict[str, Any] = {"adapter": chance.choice([None, None, "one", "two"])}
        if chance.random() < 0.7:
            options |= {"temperature": 0.9, "top_k": chance.choice([0, 40]), "top_p": chance.choice([0.9, 1.0])}
        if chance.random() < 0.3:
            options |= {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
        if chance.random() < 0.1:
            options["json_schema"] = SCHEMA
        if chance.random() < 0.2:
            options["stop"] = ["the", "\n\n"]
        if chance.random() < 0.1:
            options["n"] = 2
        return GenerateRequest(model=MODEL, prompt=prompt, seed=number, max_tokens=chance.choice([1, 8, 40]), **options)

    def _reap(self) -> None:
        for ticket in [ticket for ticket in self._open if ticket.done]:
            self._open.remove(ticket)
            try:
                self._ends[ticket.result(0).finish_reason] += 1
            except (JobCancelled, DeadlineExceeded) as error:
                self._ends[type(error).__name__] += 1

    def report(self, minutes: float) -> int:
        from engine.generation.lane import GenerateLane

        lane, pool = self._engine.lane(MODEL, "generate"), self._engine.pool(MODEL)
        assert isinstance(lane, GenerateLane)
        warm = len(self._resident) // 5
        first = float(np.median(self._resident[warm : warm + max(1, warm)]))
        last = float(np.median(self._resident[-max(1, warm) :]))
        leaked = len(lane.held) + len(lane.batch.rows) + pool.in_use
        rows: list[Row] = [
            row("soak: resident memory after warm-up", "MiB", self._resident[warm:]),
            row("soak: MLX's active memory after warm-up", "MiB", self._active[warm:]),
            row("soak: growth from warm-up to the end", "%", [100 * (last / first - 1)]),
            row("soak: tokens", "tokens/s", [self._tokens / (60 * minutes)]),
            row("soak: jobs", "jobs", [sum(self._ends.values())]),
            row("soak: rows put back for memory", "rows", [lane.preempted]),
            row("soak: rows and adapters held after the end", "held", [leaked]),
        ]
        self._engine.stop()
        path = write("soak", rows)
        print(f"ended: {dict(self._ends)}; written to {path}")
        failed = leaked > 0 or last / first - 1 > FLAT
        print("FAILED: something leaks" if failed else "flat, and nothing is held")
        return int(failed)


def _resident() -> float:
    """This process's resident memory in MiB."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    import resource

    # macOS reports the peak alone, in bytes: that too must not grow.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
