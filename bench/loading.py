"""Models are loaded next to eight running streams: the time between two tokens of each, just before and meanwhile.

Random weights of half a billion parameters on a GPU, smaller ones on a CPU: one of the Llama family, one that runs
through mlx-lm's files, and the first with a tokenizer of 150,000 tokens. The first load of a process
compiles kernels that the second finds; all are shown.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench.report import Row, row, write
from stoker.settings import load_settings
from workers.machine import boot_blas

boot_blas(load_settings())

import mlx.core as mx  # noqa: E402
import tokenizers  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers  # noqa: E402

from bench.bridged import BRIDGED  # noqa: E402
from bench.checkpoint import QWEN, SMALL, write_bridged, write_random  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.generation.limits import LaneLimits  # noqa: E402
from engine.platform.probe import device  # noqa: E402
from engine.ticket import Entry  # noqa: E402
from stoker.contract import GenerateRequest  # noqa: E402

STREAMS, LOADS = 8, 3
#: Seconds before each load that it is compared with.
ALONE = 2.0
#: Tokens of a stream: it outlasts a load.
TOKENS = 3500
#: Tokens of the large vocabulary: as many as Qwen2.5's.
LARGE = 151_000
GEMMA = BRIDGED["gemma3"]
#: On a CPU.
FEWER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
FEWER |= {"num_key_value_heads": 4, "vocab_size": 8000}
NARROW = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 8000}


def large_tokenizer(path: Path) -> Path:
    """A byte-level one with as many tokens and merges as today's large vocabularies."""
    draw = random.Random(1)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {piece: index for index, piece in enumerate(pieces)}, []
    while len(pieces) < LARGE:
        pair = draw.choice(pieces), draw.choice(pieces)
        whole = "".join(pair)
        if whole not in vocabulary and len(whole) <= 12:
            vocabulary[whole] = len(pieces)
            pieces.append(whole)
            merges.append(pair)
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(path))
    return path


def checkpoints(folder: Path) -> dict[str, Path]:
    """What is loaded, by its name in the rows; streams run on the first."""
    small = device() == "cpu"
    dtype = mx.float32 if small else mx.bfloat16
    large = write_random(folder / "large", {**SMALL, "vocab_size": QWEN["vocab_size"]} if small else QWEN, dtype)
    large_tokenizer(large / "tokenizer.json")
    return {
        "Qwen2.5-0.5B's shape": write_random(folder / "first", {**QWEN, **FEWER} if small else QWEN, dtype),
        "Gemma 3": write_bridged(folder / "bridged", {**GEMMA, **NARROW} if small else GEMMA, dtype),
        "150,000 tokens": large,
    }


class Times:
    """When each stream's tokens were there."""

    def __init__(self) -> None:
        self.of: defaultdict[str, list[float]] = defaultdict(list)

    def __call__(self, entries: list[Entry]) -> None:
        now = time.perf_counter()
        for job_id, _ in entries:
            self.of[job_id].append(now)

    def gaps(self, begin: float, end: float) -> list[float]:
        """Milliseconds between two tokens, the second within the span."""
        pairs = [pair for times in self.of.values() for pair in pairwise(times)]
        return sorted(1000 * (late - early) for early, late in pairs if begin <= late <= end)


@dataclass(frozen=True)
class Load:
    """Sorted gaps before and during a load, its seconds, and whether all streams ran throughout."""

    alone: list[float]
    during: list[float]
    seconds: float
    whole: bool


class Bench:
    def __init__(self, first: Path, home: Path) -> None:
        self.times = Times()
        self.engine = Engine(
            {"first": [str(first)]}, adapters=home, publish=self.times,
            limits=LaneLimits(slots=STREAMS, kv_bytes=4 << 30),
        )  # fmt: skip
        self.engine.start()
        # Every shape that streams of this length meet is compiled before the first load.
        for ticket in [self.engine.submit(f"warm{number}", asking()) for number in range(STREAMS)]:
            ticket.result()
        self._count = 0

    def load(self, model: Path) -> Load:
        self._count += 1
        names = [f"load{self._count}-{number}" for number in range(STREAMS)]
        streams = [self.engine.submit(name, asking()) for name in names]
        while not all(len(self.times.of[name]) > 20 for name in names):
            time.sleep(0.02)
        alone = time.perf_counter()
        time.sleep(ALONE)
        began = time.perf_counter()
        self.engine.load("second", [str(model)])
        ended = time.perf_counter()
        whole = all(not ticket.done for ticket in streams)
        for ticket in streams:
            ticket.cancel()
        for ticket in streams:
            ticket.wait(60)
        assert self.engine.unload("second")
        return Load(self.times.gaps(alone, began), self.times.gaps(began, ended), ended - began, whole)


def asking() -> GenerateRequest:
    return GenerateRequest(model="first", prompt_ids=tuple(range(3, 35)), max_tokens=TOKENS, ignore_eos=True)


def rows(name: str, load: Load) -> list[Row]:
    found = []
    for when, gaps in (("alone", load.alone), ("meanwhile", load.during)):
        values = [("p50", at(gaps, 0.5)), ("p99", at(gaps, 0.99)), ("longest", gaps[-1])]
        found += [row(f"{name}, {when}: {what} between tokens", "ms", [value]) for what, value in values]
    ratio = at(load.during, 0.99) / at(load.alone, 0.99)
    whole = "" if load.whole else ", a stream ended meanwhile"
    return [*found, row(f"{name}: ratio of p99{whole}", "times", [ratio]), row(f"{name}: took", "s", [load.seconds])]


def at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=int, default=LOADS, help="how often each model is loaded")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = checkpoints(Path(folder))
        bench = Bench(next(iter(found.values())), Path(folder) / "adapters")
        loads = [(name, number, bench.load(path)) for name, path in found.items() for number in range(options.loads)]
        bench.engine.stop()
    lines = [line for name, number, load in loads for line in rows(f"{name}, load {number + 1}", load)]
    write("loading" if device() == "cpu" else "loading-gpu", lines)


if __name__ == "__main__":
    main()
