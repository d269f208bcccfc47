"""How long the broker keeps what: as the page says."""

from __future__ import annotations

import re

import pytest

from stoker.broker import keys
from tests.docs.pages import ROOT

SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 24 * 3600}
#: Key → how long it lives, for the first lifetime that its row names.
LIVES = {
    "job:<job>": keys.PENDING_TTL,
    "open:<queue>": keys.PENDING_TTL,
    "pace:<queue>": keys.RESULT_TTL,
    "dead": keys.DEAD_TTL,
    "spoiled:<key>": keys.DEAD_TTL,
    "celery-task-meta-<job>": keys.RESULT_TTL,
    "stream:<job>": keys.RESULT_TTL,
    "blob:vectors:<job>": keys.RESULT_TTL,
    "worker:<worker>": keys.PRESENCE_TTL,
    "command:<id>": keys.COMMAND_TTL,
    "models": keys.MODEL_TTL,
    "file:<id>": keys.FILE_TTL,
    "files:<key>": keys.FILES_TTL,
    "fine_tune:<job>": keys.FINE_TUNE_TTL,
    "fine_tunes:<key>": keys.FINE_TUNES_TTL,
    "batch:<id>": keys.BATCH_TTL,
    "batch_runner:<place>": keys.RUNNER_TTL,
    "rate:<key>": keys.RATE_TTL,
}
#: The others that a row names.
FURTHER = {
    "job:<job>": [keys.RESULT_TTL],
    "blob:vectors:<job>": [keys.FETCHED_TTL],
    "blob:dataset:<job>": [keys.PENDING_TTL, keys.DEAD_TTL],
    "checkpoint:<job>": [keys.PENDING_TTL, keys.DEAD_TTL],
}


def said(name: str) -> list[int]:
    (row,) = re.findall(
        rf"^\| `stoker:{re.escape(name)}` \| [^|]+ \| ([^|]+) \|", (ROOT / "docs" / "redis.md").read_text("utf-8"), re.M
    )
    return [int(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+) (seconds|minutes|hours|days)", row)]


@pytest.mark.parametrize("name", sorted({*LIVES, *FURTHER}))
def test_what_the_broker_keeps_it_keeps_for_as_long_as_the_page_says(name: str) -> None:
    found = said(name)
    if name in LIVES:
        assert found[0] == LIVES[name]
    assert found[-len(FURTHER.get(name, ())) or len(found) :] == FURTHER.get(name, [])
