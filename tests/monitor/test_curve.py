"""A run's curve: bounded, and true at its ends."""

from __future__ import annotations

from typing import Any

import pytest

from stoker.contract import TrainReport
from stoker.monitor.curve import POINTS, Curve
from stoker.monitor.watch import read_reports


def report(step: int, **changes: Any) -> TrainReport:
    fields = {"index": step - 1, "step": step, "steps": 100, "loss": 5.0 / step, "learning_rate": 0.1}
    return TrainReport(**{**fields, "gradient_norm": 1.0, "tokens": step, "tokens_per_second": 61.4, **changes})


def fed(*reports: TrainReport) -> Curve:
    curve = Curve()
    for each in reports:
        curve.add(each)
    return curve


def test_progress_reads_as_people_say_it() -> None:
    assert fed(report(41), report(42, loss=1.234)).text == "step 42/100 · loss 1.23 · 61 tokens/s"
    assert fed(report(42)).share == pytest.approx(0.42)
    assert (Curve().text, Curve().share, Curve().shown) == ("", 0.0, [])


@pytest.mark.parametrize("steps", [1, 2, POINTS, POINTS + 1, 10 * POINTS + 3])
def test_a_long_run_has_as_many_points_as_fit_and_both_its_ends(steps: int) -> None:
    curve = fed(*(report(step, held_out_loss=1.0 / step) for step in range(1, steps + 1)))
    for points in (curve.shown, curve.held_out):
        assert len(points) <= POINTS + 1
        assert points[0][0] == 1
        assert points == sorted(points)
    assert curve.shown[-1] == (steps, 5.0 / steps)
    assert steps <= POINTS or len(curve.shown) > POINTS // 3


def test_a_long_curve_keeps_its_shape_and_its_newest_points() -> None:
    steps = 10 * POINTS
    curve = fed(*(report(step, held_out_loss=1.0) for step in range(1, steps + 1)))
    for points in (curve.points, curve.held_out):
        assert points[-1][0] == steps
        assert sum(step > steps // 2 for step, _ in points) >= len(points) // 3


def test_a_run_that_was_rolled_back_is_drawn_from_where_it_goes_on() -> None:
    curve = fed(report(1), report(2), report(3, loss=99.0), report(2, loss=2.0, note="rolled back"), report(3))
    assert [step for step, _ in curve.shown] == [1, 2, 3]
    assert curve.shown[1] == (2, 2.0)


def test_a_report_that_cannot_be_read_is_left_out() -> None:
    good = report(1).model_dump_json().encode()
    entries = [(b"1-0", {b"entry": good}), (b"2-0", {b"entry": b"{"}), (b"3-0", {b"other": b""})]
    assert list(read_reports(entries)) == [report(1)]


def test_a_curve_that_was_thinned_still_shows_its_newest_point() -> None:
    curve = fed(*(report(step) for step in range(1, POINTS + 2)))
    assert curve.points[-1][0] == POINTS + 1
    curve.points.pop()
    assert curve.shown[-1] == (POINTS + 1, 5.0 / (POINTS + 1))


def test_what_is_thinned_lies_between_the_ends() -> None:
    curve = fed(*(report(step) for step in range(1, POINTS + 2)))
    assert [step for step, _ in curve.points[:3]] == [1, 3, 5]
    assert [step for step, _ in curve.points[-2:]] in ([POINTS - 1, POINTS + 1], [POINTS, POINTS + 1])
