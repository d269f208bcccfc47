"""Tests that use one stack run in one process, so that it is started once."""

from __future__ import annotations

import pytest

from tests.processes import STACKS, unit_of


def test_what_uses_a_shared_stack_is_in_the_unit_of_that_stack(request: pytest.FixtureRequest) -> None:
    used = {
        (item.nodeid.partition("::")[0], unit)
        for item in request.session.items
        for name, unit in STACKS.items()
        if name in item.fixturenames  # type: ignore[attr-defined]
    }
    assert {(file, unit) for file, unit in used if unit_of(file) != unit} == set()
