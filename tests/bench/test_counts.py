"""Counts that no clock changes are those of the committed file, or at most a fifth more."""

from __future__ import annotations

from pathlib import Path

from bench import counts
from bench.device import busy


def test_nothing_that_is_counted_grew_by_more_than_a_fifth(tmp_path: Path) -> None:
    problems = counts.problems(counts.counted(tmp_path), counts.committed())
    assert not problems, f"{'; '.join(problems)}. {counts.RENEW}."


def test_growth_beyond_a_fifth_is_said_and_a_fall_is_not() -> None:
    before = {"launches": 200.0, "bytes": 100.0, "gone": 1.0}
    assert counts.problems({"launches": 240.0, "bytes": 5.0, "gone": 1.0}, before) == []
    assert counts.problems({"launches": 241.0, "bytes": 100.0, "new": 3.0}, before) == [
        "launches: 200 before, 241 now",
        "new: not in counts.json yet",
        "gone: in counts.json, and counted no more",
    ]


def test_a_device_that_does_two_things_at_once_works_once() -> None:
    assert busy([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 5.0
    assert busy([]) == 0.0
