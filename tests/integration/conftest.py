"""What these tests share: brokers that may break, and a monitor of the shared stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.local.stack import Stack
from tests.integration.machinery import FragileBroker
from tests.monitor.conftest import Running, monitor_of


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[FragileBroker]:
    broker = FragileBroker(tmp_path / "fragile")
    yield broker
    broker.close()


@pytest.fixture(scope="session")
def stack(quick_stack: Stack) -> Stack:
    """What this room shows hangs on no weights, except where a module says so."""
    return quick_stack


@pytest.fixture(scope="session")
def monitor(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A `stoker flower` that watches the shared stack."""
    with monitor_of(stack, tmp_path_factory.mktemp("monitor")) as running:
        yield running
