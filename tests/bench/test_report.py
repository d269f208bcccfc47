"""Rows are made by turns, are judged by their aims, and what is in doubt is not said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report
from bench.aims import AIMS, Aim, least, most
from bench.report import COMMIT, Record, against, by_turns, machine, number, parser, ratio, row, shown, write

NAME, ROW = "generate", "1 stream, decode, against mlx-lm"


def test_sides_take_turns_and_each_is_first_as_often_as_last() -> None:
    order: list[str] = []

    def side(name: str) -> int:
        order.append(name)
        return len(order)

    found = by_turns({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=3, warm=1)
    assert "".join(order) == "abbaabba"
    assert found == {"a": [4, 5, 8], "b": [3, 6, 7]}, "the first round warms up"


def test_a_ratio_is_the_median_over_turns_not_the_ratio_of_medians() -> None:
    """The machine became three times as fast in the middle: both sides alike, and the ratio stays."""
    ours, other = [10.0, 10.0, 30.0, 30.0], [5.0, 5.0, 15.0, 15.0]
    found = ratio("x", ours, other)
    assert (found.p20, found.p50, found.p80, found.unit, found.samples) == (2.0, 2.0, 2.0, "times", 4)
    assert [entry.name for entry in against("x", "s", ours, "y", other)] == ["x", "x: y", "x, against y"]


@pytest.mark.parametrize(
    ("aim", "spread", "met"),
    [
        (least(1.25), (1.25, 1.4), True),
        (least(1.25), (1.1, 1.24), False),
        (least(1.25), (1.2, 1.3), None),
        (most(2), (1.0, 2.0), True),
        (most(2), (2.1, 3.0), False),
        (most(2), (1.9, 2.1), None),
    ],
)
def test_an_aim_is_met_or_missed_by_the_whole_spread_or_it_is_open(
    aim: Aim, spread: tuple[float, float], met: bool | None
) -> None:
    assert aim.met(*spread) is met


def test_a_value_whose_spread_crosses_its_aim_is_not_said() -> None:
    crossing, good, bad = ([low, 1.3, high] for low, high in ((1.1, 1.6), (1.3, 1.4), (0.8, 1.0)))
    line = shown(NAME, row(ROW, "times", crossing))
    assert "not said" in line
    assert "1.30" not in line
    assert "(1.18 to 1.48)" in line
    assert "at least 1.25: the spread crosses it" in line
    assert shown(NAME, row(ROW, "times", good)).endswith("1.30 times      (1.30 to 1.36)  at least 1.25: met")
    assert "MISSED" in shown(NAME, row(ROW, "times", [0.8, 0.9, 1.0]))
    assert "MISSED" not in shown("another", row(ROW, "times", bad)), "it has no aim there"


def test_a_record_has_rows_with_their_aims_and_a_part_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMMIT, "abc1234")
    record = Record(NAME, tmp_path, device="cpu")
    record.part("single", lambda: [row(ROW, "times", [1.3]), row("speed", "tokens/s", [2.0])])
    before = record.failed
    record.part("many", lambda: [row("x", "s", [1 / 0])])
    record.keep(more=1)
    assert (before, record.failed) == (False, True)
    said = json.loads((tmp_path / "generate.json").read_text("utf-8"))
    assert (said["device"], said["commit"], said["more"]) == ("cpu", "abc1234", 1)
    numbers = {"p20": 1.3, "p50": 1.3, "p80": 1.3, "samples": 1}
    assert said["rows"][0] == {"name": ROW, "unit": "times", **numbers, "aim": "at least 1.25", "met": True}
    assert "aim" not in said["rows"][1]
    assert said["rows"][2] == {"name": "many", "error": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert write("other", [row("x", "s", [1.0])], tmp_path).exists()


def test_the_commit_of_a_changed_checkout_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMIT, raising=False)
    answers = {"rev-parse": "abc1234", "status": ""}
    monkeypatch.setattr(report, "git", lambda command, *_: answers[command])
    assert machine()["commit"] == "abc1234"
    answers["status"] = " M bench/report.py"
    assert machine()["commit"] == "abc1234+dirty"
    answers["rev-parse"] = ""
    assert machine()["commit"] == "unknown", "a copy of the files alone"


def test_every_benchmark_has_a_quick_form_and_a_folder() -> None:
    options = parser("what it does").parse_args(["--quick", "--out", "somewhere"])
    assert (options.quick, options.out) == (True, Path("somewhere"))


def test_numbers_have_as_many_digits_as_matter() -> None:
    assert [number(value) for value in (18_546.4, 99.5, 1.234, 0.000123, 0)] == [
        "18,546",
        "99.5",
        "1.23",
        "0.00012",
        "0.00",
    ]


def test_no_aim_is_zero_or_less() -> None:
    assert min(aim.bound for rows in AIMS.values() for aim in rows.values()) > 0
