"""What is said of a file that grows where there is no terminal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stoker.cli import progress as module
from stoker.cli.progress import REPORT_EVERY, progress


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_a_run_that_goes_on_counts_speed_and_time_by_its_own_rows(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    output = SimpleNamespace(done=600)
    with progress(output, 1000, "texts") as report:
        clock.now, output.done = clock.now + 20, 700
        report()
    assert capsys.readouterr().err == "700 of 1,000 texts, 5.0 texts/s, 60 s left\n"


def test_a_line_comes_now_and_then_and_not_with_each_row(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    output = SimpleNamespace(done=0)
    with progress(output, 100, "answers") as report:
        for _ in range(50):
            clock.now, output.done = clock.now + 1, output.done + 1
            report()
    assert len(capsys.readouterr().err.splitlines()) == 50 // REPORT_EVERY


def test_nothing_that_came_is_no_division_by_zero(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(SimpleNamespace(done=0), 2, "answers") as report:
        clock.now += REPORT_EVERY
        report()
    assert capsys.readouterr().err.startswith("0 of 2 answers, 0.0 answers/s")
