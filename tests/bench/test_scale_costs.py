"""What is a difference of two measures is above zero, or no row."""

from __future__ import annotations

import pytest

from bench.scale_costs import added


def test_what_each_of_many_adds_is_said_by_turns() -> None:
    assert added([100.0, 500.0], [300.0, 900.0], 4) == [50.0, 100.0]


@pytest.mark.parametrize("within", [[300.0, 499.0], [300.0, 500.0]], ids=["less", "no more"])
def test_what_is_lost_in_what_else_the_broker_does_is_not_said(within: list[float]) -> None:
    with pytest.raises(ValueError, match="not said: without it"):
        added([100.0, 500.0], within, 4)
