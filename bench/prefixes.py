"""A system prompt whose keys and values are on the disk: the first token of a worker that starts again, with and
without.

The two sides take turns within a second, each with an engine lane that has nothing in memory. SmolLM2 as the demo has
it; the whole of `prepare` counts, so finding, reading and checking the file is in the numbers.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import Record, Row, by_turns, parser, ratio, row
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
TIMES, QUICK = 7, 3


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


def rows_of(model: LoadedModel, home: Path, length: int, times: int) -> list[Row]:
    """First tokens without and with an entry of `length` tokens."""
    store = AdapterStore(home / "adapters")
    pool = AdapterPool(model, store)
    disk = PrefixDisk(DiskLimits(home / "prefixes", 4 << 30), store, here)
    shelf = disk.shelf(model)
    assert shelf is not None
    system = [(7 * index + length) % 4000 + 100 for index in range(length)]
    prompts = [[*system, *range(100 + index, 100 + index + BEHIND)] for index in range(times + 3)]
    before = len(files(home))
    filling = GenerateLane(model, pool, shelf=shelf)
    first_token(filling, prompts[0], 0)
    first_token(filling, prompts[1], length)
    until = time.monotonic() + 60
    while len(files(home)) == before:
        assert time.monotonic() < until, "the prefix is not on the disk"
        time.sleep(0.01)
    turn = {kept: iter(prompts[2:]) for kept in (False, True)}

    def once(kept: bool) -> float:
        lane = GenerateLane(model, pool, shelf=shelf if kept else None)
        return 1000 * first_token(lane, next(turn[kept]), length if kept else 0)

    found = by_turns({"prefilled": partial(once, False), "from disk": partial(once, True)}, times)
    disk.end(10)
    return [
        *(row(f"{length} tokens: first token, {name}", "ms", samples) for name, samples in found.items()),
        ratio(f"{length} tokens: prefilled / from disk", found["prefilled"], found["from disk"]),
    ]


def main() -> int:
    options = parser(__doc__).parse_args()
    model = load(MODEL, CATALOGUE[MODEL])
    record = Record("prefixes", options.out)
    lengths, times = (LENGTHS[:2], QUICK) if options.quick else (LENGTHS, TIMES)
    with tempfile.TemporaryDirectory() as home:
        for length in lengths:
            record.part(f"{length} tokens", partial(rows_of, model, Path(home), length, times))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
