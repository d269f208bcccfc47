"""`make chaos SECONDS=1200 SEED=1`: the long form, with `RANKS=2` a group among the workers; the short one is part of
`make test`."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.fleet import make_models
from tests.chaos.load import Answers
from tests.chaos.storm import Storm

pytestmark = pytest.mark.integration

ACTS = (
    "kill",
    "freeze",
    "drain",
    "start",
    "cut",
    "broker restart",
    "broker silence",
    "poison",
    "full disk",
    "locked disk",
    "rank kill",
    "rank freeze",
)
#: Seconds of mischief between two reckonings of the long form.
ROUND = 60.0


def storm_for(seconds: float, seed: int, folder: Path, width: int, ranks: int = 1) -> list[str]:
    """Rounds until `seconds` are over, `width` jobs at a time, with a group of `ranks` among the workers if they are
    more than one; prints each seed and a summary, returns all that went wrong."""
    models, total, wrong = make_models(folder), Counter[str](), []
    answers = Answers(folder / "round-0" / "fleet" / "adapters", exact=ranks == 1)
    end, number = time.monotonic() + seconds, 0
    while number == 0 or time.monotonic() < end:
        storm = Storm(folder / f"round-{number}", models, seed + number, width, ranks)
        print(f"round {number}: seed {seed + number}", flush=True)
        try:
            if not answers.right:
                storm.learn(answers)
            found = storm.run(min(ROUND, max(5.0, end - time.monotonic())), answers)
        finally:
            found_left = storm.close()
        for problem in (*found, *found_left):
            wrong.append(f"seed {seed + number}: {problem}")
            print(f"  VIOLATION {problem}", flush=True)
        print(f"  {_said(storm.counts)}", flush=True)
        total += storm.counts
        number += 1
    print(f"chaos: {number} rounds, {_said(total)}, violations {len(wrong)}", flush=True)
    return wrong


def _said(counts: Counter[str]) -> str:
    return ", ".join(
        f"{name} {counts[name]}" for name in ("jobs", "entries", "cancelled", "refused", "lettered", *ACTS)
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_storm_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    assert storm_for(8, 7, tmp_path, width=6) == []


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_a_long_storm_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    seconds, seed = float(os.environ.get("CHAOS_SECONDS", "1200")), int(os.environ.get("CHAOS_SEED", "1"))
    ranks = int(os.environ.get("CHAOS_RANKS", "1"))
    assert storm_for(seconds, seed, tmp_path, width=10, ranks=ranks) == []
