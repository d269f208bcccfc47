"""A system prompt whose keys and values are on the disk: the first token of a worker that starts again, with and
without.

The two sides take turns within a second, each with an engine lane that has nothing in memory. SmolLM2 as the demo has
it; the whole of `prepare` counts, so finding, reading and checking the file is in the numbers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report import Row, row, write
from stoker.catalogue import CATALOGUE
from stoker.settings import load_settings
from workers.machine import boot_blas

boot_blas(load_settings())

from engine.adapters.pool import AdapterPool  # noqa: E402
from engine.adapters.store import AdapterStore  # noqa: E402
from engine.checkpoints.loading import LoadedModel, load  # noqa: E402
from engine.generation.lane import GenerateLane  # noqa: E402
from engine.prefixes.disk import DiskLimits, PrefixDisk  # noqa: E402
from engine.ticket import Ticket  # noqa: E402
from stoker.contract import GenerateRequest, GenerateResult  # noqa: E402

MODEL = "smollm2-135m-instruct"
#: Tokens of the system prompts, and of what comes behind them.
LENGTHS, BEHIND = (64, 128, 512, 1024), 16
TIMES = 7


def first_token(lane: GenerateLane, prompt: Sequence[int], found: int) -> float:
    """Seconds from the request to the first token, of which `found` tokens have to have been kept."""
    request = GenerateRequest(model=MODEL, prompt_ids=tuple(prompt), max_tokens=1)
    ticket: Ticket[GenerateResult] = Ticket("bench", "generate")
    began = time.perf_counter()
    lane.admit(lane.prepare(ticket, request, None))
    while True:
        for _, result in lane.run().ended:
            seconds = time.perf_counter() - began
            assert result.usage.cached_tokens == found, f"{result.usage.cached_tokens} found, {found} expected"
            return seconds


def here(call: Callable[[], Any]) -> Any:
    return call()


def files(home: Path) -> list[Path]:
    """The entries on the disk."""
    return list((home / "prefixes").glob("*/*.safetensors"))


def rows_of(model: LoadedModel, home: Path, length: int) -> list[Row]:
    """First tokens without and with an entry of `length` tokens."""
    store = AdapterStore(home / "adapters")
    pool = AdapterPool(model, store)
    disk = PrefixDisk(DiskLimits(home / "prefixes", 4 << 30), store, here)
    shelf = disk.shelf(model)
    assert shelf is not None
    system = [(7 * index + length) % 4000 + 100 for index in range(length)]
    prompts = [[*system, *range(100 + index, 100 + index + BEHIND)] for index in range(TIMES + 3)]
    before = len(files(home))
    filling = GenerateLane(model, pool, shelf=shelf)
    first_token(filling, prompts[0], 0)
    first_token(filling, prompts[1], length)
    until = time.monotonic() + 60
    while len(files(home)) == before:
        assert time.monotonic() < until, "the prefix is not on the disk"
        time.sleep(0.01)
    samples: dict[bool, list[float]] = {True: [], False: []}
    for prompt in prompts[2:]:
        for kept in (False, True):
            lane = GenerateLane(model, pool, shelf=shelf if kept else None)
            samples[kept].append(first_token(lane, prompt, length if kept else 0))
    disk.end(10)
    gained = [without / with_ for without, with_ in zip(samples[False], samples[True], strict=True)][1:]
    return [
        row(f"{length} tokens: first token, prefilled", "ms", [1000 * seconds for seconds in samples[False][1:]]),
        row(f"{length} tokens: first token, from disk", "ms", [1000 * seconds for seconds in samples[True][1:]]),
        row(f"{length} tokens: prefilled / from disk", "times", gained),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    model = load(MODEL, CATALOGUE[MODEL])
    with tempfile.TemporaryDirectory() as home:
        write("prefixes", [found for length in LENGTHS for found in rows_of(model, Path(home), length)])


if __name__ == "__main__":
    main()
