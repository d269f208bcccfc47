"""`make fuzz SECONDS=600 SEED=1 ONLY=number`: the long form; the short one is part of `make test-slow`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.run import drawn, fuzz

pytestmark = pytest.mark.integration


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_random_input_for_ten_seconds_hurts_itself_alone(tmp_path: Path) -> None:
    assert fuzz(10, 1, tmp_path).wrong == []


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_random_input_for_long_hurts_itself_alone(tmp_path: Path) -> None:
    seconds, seed = float(os.environ.get("FUZZ_SECONDS", "600")), int(os.environ.get("FUZZ_SEED", "1"))
    only = os.environ.get("FUZZ_ONLY")
    assert fuzz(seconds, seed, tmp_path, int(only) if only else None).wrong == []


def test_an_input_is_the_same_for_the_same_numbers() -> None:
    first = [drawn(7, number) for number in range(1, 300)]
    again = [drawn(7, number) for number in range(1, 300)]
    assert [(name, given.what) for name, given in first] == [(name, given.what) for name, given in again]
    assert {name for name, _ in first} == {"messages", "keys", "options", "grammars", "files", "uploads", "texts"}
