"""Which of a test's parameters run in `make test`, and which in `make test-slow` too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def quick(*chosen: Any, of: Iterable[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: the others are slow."""
    return [each if each in chosen else pytest.param(each, marks=pytest.mark.slow) for each in of]


def in_turn(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Every pair; quick are those in which each of the first has one of the second, by turns, so that all come."""
    return [
        pytest.param(one, other, marks=[] if place % len(second) == number else pytest.mark.slow)
        for place, one in enumerate(first)
        for number, other in enumerate(second)
    ]
