"""What the tests of broken brokers and workers share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.machinery import FragileBroker


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[FragileBroker]:
    broker = FragileBroker(tmp_path / "fragile")
    yield broker
    broker.close()
