"""What these tests share: brokers that may break, and a monitor of the shared stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.local.stack import Stack
from tests.conftest import wait_until
from tests.integration.machinery import FragileBroker
from tests.monitor.conftest import Running


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[FragileBroker]:
    broker = FragileBroker(tmp_path / "fragile")
    yield broker
    broker.close()


@pytest.fixture(scope="session")
def monitor(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A `stoker flower` that watches the shared stack."""
    home: Path = tmp_path_factory.mktemp("monitor")
    running = Running(stack.settings.model_copy(update={"home": home}))
    try:
        wait_until(lambda: running.seen()["workers"], "the worker is seen")
        yield running
    finally:
        running.stop()
