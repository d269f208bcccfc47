"""What a worker removes of its machine's runs while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.local.keeping import SentAgain
from stoker.local.storage import Leftover
from stoker.settings import Settings
from workers.services import housekeeping
from workers.services.housekeeping import EVERY, Housekeeping


def test_what_went_is_in_the_log_with_its_reason_and_its_megabytes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = [Leftover(Path("/runs/a"), "a run beyond what is kept", 3 * 2**20)]
    moments: list[float] = []

    def remove(settings: Settings, now: float, again: SentAgain) -> list[Leftover]:
        moments.append(now)
        return gone

    monkeypatch.setattr(housekeeping, "remove_over_limits", remove)
    with caplog.at_level("INFO"):
        Housekeeping(Settings(), lambda run: False, lambda: 7.0).round()
    assert moments == [7.0]
    assert caplog.messages == ["/runs/a: removed (a run beyond what is kept), 3.0 MB"]


def test_a_worker_that_runs_for_a_year_looks_every_hour() -> None:
    assert EVERY == 3600
