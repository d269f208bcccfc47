"""`stoker up` on a broker that holds a gigabyte: every start comes up, and shows how far the load is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import redis

from stoker.local.broker import EmbeddedBroker
from stoker.local.stack import Stack
from tests.conftest import EMBED_MODEL, stack_settings
from tests.loading import rewrite

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]

#: Smaller and fewer for a first look.
MEGABYTES = int(os.environ.get("LARGE_BROKER_MB", "1024"))
STARTS = int(os.environ.get("LARGE_BROKER_STARTS", "20"))
VALUE = 64 * 1024


def fill(url: str) -> None:
    """Values that no compression makes smaller; half of them in the append-only file's snapshot, half behind it."""
    with redis.Redis.from_url(url, socket_timeout=120) as client:
        for half in range(2):
            for number in range(MEGABYTES * 2**20 // VALUE // 2):
                client.set(f"stoker:blob:vectors:{half}-{number}", os.urandom(VALUE), ex=24 * 3600)
            if not half:
                rewrite(client, 300)


def test_every_start_with_much_data_comes_up(tmp_path: Path) -> None:
    settings = stack_settings(tmp_path / "large", models=(EMBED_MODEL,))
    broker = EmbeddedBroker(settings, port=0)
    fill(broker.start())
    broker.stop()
    for start in range(STARTS):
        reports: list[str] = []
        with Stack(settings, flower=False, own_broker=True, report=reports.append) as stack:
            assert stack.wait_until_warm().models, f"start {start}"
            with redis.Redis.from_url(stack.settings.address.redis) as client:
                assert client.dbsize() >= 2 * (MEGABYTES * 2**20 // VALUE // 2)
        shown = [text for text in reports if text.startswith("the broker is loading its data")]
        assert shown, f"start {start} said nothing of the load"
        assert all(re.search(r"\d+ %, about \d+ s left", text) for text in shown)
